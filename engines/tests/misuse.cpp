// What a program may do wrong or at an awkward moment, a test each; prints the failures.
//
//   ssd_misuse BUNDLE [NAME...]
//
// Run as it is, with sanitizers and with valgrind by tests/engines.
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include <unistd.h>

#include "ssd_runtime/ssd_runtime.hpp"

namespace {

std::string bundle;
int num_failed = 0;

void expect(bool holds, char const* what, int line) {
    if (!holds) {
        std::printf("line %d: %s\n", line, what);
        ++num_failed;
    }
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

// A refusal: the status, and a sentence with this in it.
void refused(ssd_status status, ssd_error const& error, ssd_status wanted, char const* part,
             int line) {
    bool const fits =
        status == wanted && error.status == wanted && std::strstr(error.message, part) != nullptr;
    if (!fits) {
        std::printf("line %d: status %d, \"%s\", expected %d, \"...%s...\"\n", line, status,
                    error.message, wanted, part);
        ++num_failed;
    }
}
#define REFUSED(call, wanted, part)                     \
    do {                                                \
        ssd_error error;                                \
        ssd_status const status = call;                 \
        refused(status, error, wanted, part, __LINE__); \
    } while (false)

ssd::Request request_of(ssd::Model const& model, char const* prompt = "a red circle") {
    return ssd::Request(model, {prompt});
}

void null_handles() {
    ssd_model_params params;
    ssd_model_params_init(&params, sizeof params);
    ssd_model_params_init(nullptr, sizeof params);
    ssd_model* model = nullptr;
    size_t count = 0;
    int32_t id = 0;
    ssd_model_destroy(nullptr);
    ssd_generation_destroy(nullptr);
    REFUSED(ssd_model_create(nullptr, &model, &error), SSD_INVALID_ARGUMENT, "params is NULL");
    REFUSED(ssd_model_create(&params, nullptr, &error), SSD_INVALID_ARGUMENT, "model is NULL");
    REFUSED(ssd_model_create(&params, &model, &error), SSD_INVALID_ARGUMENT, "bundle is empty");
    REFUSED(ssd_model_describe(nullptr, nullptr, &error), SSD_INVALID_ARGUMENT, "model is NULL");
    REFUSED(ssd_encode(nullptr, "a", &id, 1, &count, &error), SSD_INVALID_ARGUMENT,
            "model is NULL");
    REFUSED(ssd_plan(nullptr, 1, 1, nullptr, &error), SSD_INVALID_ARGUMENT, "model is NULL");
    REFUSED(ssd_generate_params_init(nullptr, 0, nullptr, &error), SSD_INVALID_ARGUMENT, "is NULL");
    REFUSED(ssd_generation_create(nullptr, nullptr, nullptr, &error), SSD_INVALID_ARGUMENT, "NULL");
    REFUSED(ssd_generate(nullptr, &error), SSD_INVALID_ARGUMENT, "generation is NULL");
    REFUSED(ssd_step_row(nullptr, nullptr, &error), SSD_INVALID_ARGUMENT, "generation is NULL");
    REFUSED(ssd_cancel(nullptr, SSD_CANCEL_NOW, &error), SSD_INVALID_ARGUMENT, "is NULL");
    REFUSED(ssd_generation_images(nullptr, nullptr, &error), SSD_INVALID_ARGUMENT, "is NULL");
    REFUSED(ssd_cache_bytes(nullptr, nullptr, &error), SSD_INVALID_ARGUMENT, "is NULL");
    REFUSED(ssd_devices(nullptr, 0, nullptr, &error), SSD_INVALID_ARGUMENT, "count is NULL");
    REFUSED(ssd_devices(nullptr, 1, &count, &error), SSD_INVALID_ARGUMENT, "devices is NULL");
    REFUSED(ssd_write_png(nullptr, nullptr, 1, 1, nullptr, 0, &error), SSD_INVALID_ARGUMENT,
            "NULL");
    EXPECT(ssd_generate(nullptr, nullptr) == SSD_INVALID_ARGUMENT);
}

void wrong_models() {
    ssd_model_params params;
    ssd_model_params_init(&params, sizeof params);
    ssd_model* model = nullptr;
    params.bundle = "/nowhere/at/all";
    REFUSED(ssd_model_create(&params, &model, &error), SSD_BAD_BUNDLE, "no bundle at /nowhere");
    params.bundle = bundle.c_str();
    params.backend = "abacus";
    REFUSED(ssd_model_create(&params, &model, &error), SSD_INVALID_ARGUMENT,
            "unknown backend 'abacus'");
    params.backend = "onnxruntime";
    params.provider = "abacus";
    REFUSED(ssd_model_create(&params, &model, &error), SSD_INVALID_ARGUMENT, "unknown provider");
    params.provider = "cpu";
    params.num_threads = -1;
    REFUSED(ssd_model_create(&params, &model, &error), SSD_INVALID_ARGUMENT, "num_threads=-1");
    params.num_threads = 0;
    params.struct_size = 0;
    REFUSED(ssd_model_create(&params, &model, &error), SSD_INVALID_ARGUMENT, "struct_size=0");
    EXPECT(model == nullptr);
}

// A program built with an earlier header has room for fewer fields: behind them nothing is written.
void init_of_an_earlier_program(ssd_model const* model) {
    ssd_generate_params params;
    std::memset(&params, 0x5A, sizeof params);
    size_t const size = offsetof(ssd_generate_params, lookahead);
    EXPECT(ssd_generate_params_init(&params, size, model, nullptr) == SSD_OK);
    EXPECT(params.struct_size == size && params.num_images == 1 && params.lookahead == 0x5A5A5A5A);
    REFUSED(ssd_generate_params_init(&params, 5000, model, &error), SSD_INVALID_ARGUMENT,
            "struct_size=5000");
    ssd_model_params opened;
    std::memset(&opened, 0x5A, sizeof opened);
    ssd_model_params_init(&opened, offsetof(ssd_model_params, num_threads));
    EXPECT(opened.bundle == nullptr && opened.num_threads == 0x5A5A5A5A);
}

// A program built with a later header passes a longer struct; what it sets there is not ignored.
void structs_of_other_versions() {
    struct Later {
        ssd_model_params params;
        uint64_t something_new;
    } later{};
    later.something_new = 7;
    ssd_model_params_init(&later.params, sizeof later);
    EXPECT(later.params.struct_size == sizeof later && later.something_new == 0);
    later.params.bundle = bundle.c_str();
    ssd_model* model = nullptr;
    EXPECT(ssd_model_create(&later.params, &model, nullptr) == SSD_OK);
    later.something_new = 1;
    ssd_model* none = nullptr;
    REFUSED(ssd_model_create(&later.params, &none, &error), SSD_INVALID_ARGUMENT, "does not know");
    ssd_model_info info;
    std::memset(&info, 0x5A, sizeof info);
    info.struct_size = 5 * sizeof(uint32_t);  // of an earlier version: the rest is not touched
    EXPECT(ssd_model_describe(model, &info, nullptr) == SSD_OK);
    EXPECT(info.width > 0 && info.prompt_slots == 0x5A5A5A5A && info.struct_size == 20);
    struct LaterInfo {
        ssd_model_info info;
        uint64_t something_new;
    } later_info{};
    later_info.something_new = 7;
    later_info.info.struct_size = sizeof later_info;
    EXPECT(ssd_model_describe(model, &later_info.info, nullptr) == SSD_OK);
    EXPECT(later_info.info.width > 0 && later_info.something_new == 0);
    init_of_an_earlier_program(model);
    ssd_model_destroy(model);
}

// A program built with an earlier header has no negative prompts: what lies behind its struct is
// not read, and the image is the same.
void generation_by_an_earlier_program() {
    ssd::Model const model(bundle);
    ssd::Generation now(model, request_of(model));
    now.run();
    ssd_prompt const prompt{"a red circle", nullptr, 0};
    ssd_generate_params params;
    EXPECT(ssd_generate_params_init(&params, sizeof params, model.get(), nullptr) == SSD_OK);
    params.prompts = &prompt;
    params.num_prompts = 1;
    size_t const size = offsetof(ssd_generate_params, negative_prompts);
    std::memset(reinterpret_cast<char*>(&params) + size, 0x5A, sizeof params - size);
    params.struct_size = static_cast<uint32_t>(size);
    ssd_generation* generation = nullptr;
    EXPECT(ssd_generation_create(model.get(), &params, &generation, nullptr) == SSD_OK);
    EXPECT(ssd_generate(generation, nullptr) == SSD_OK);
    ssd_images images{};
    images.struct_size = sizeof images;
    EXPECT(ssd_generation_images(generation, &images, nullptr) == SSD_OK);
    size_t const num_pixels = size_t{images.width} * images.height * 3;
    EXPECT(std::memcmp(images.pixels, now.images().pixels, num_pixels) == 0);
    ssd_generation_destroy(generation);
}

void wrong_numbers() {
    ssd::Model const model(bundle);
    auto const refuse = [&model](std::function<void(ssd_generate_params&)> const& change,
                                 char const* part, int line) {
        ssd::Request request = request_of(model);
        ssd_prompt const prompt{"a red circle", nullptr, 0};
        request.params.prompts = &prompt;
        request.params.num_prompts = 1;
        change(request.params);
        ssd_error error;
        ssd_generation* generation = nullptr;
        ssd_status const status =
            ssd_generation_create(model.get(), &request.params, &generation, &error);
        refused(status, error, SSD_INVALID_ARGUMENT, part, line);
        EXPECT(generation == nullptr);
    };
    using Params = ssd_generate_params;
    float const infinite = std::numeric_limits<float>::infinity();
    refuse([](Params& p) { p.cfg_scale = NAN; }, "cfg_scale nan is not a number", __LINE__);
    refuse([](Params& p) { p.cfg_scale = -1; }, "cfg_scale -1 is outside 0 .. 1e+06", __LINE__);
    refuse([](Params& p) { p.temperature = NAN; }, "temperature nan is not a number", __LINE__);
    refuse([=](Params& p) { p.temperature = infinite; }, "temperature inf is not", __LINE__);
    refuse([](Params& p) { p.temperature = -1; }, "temperature -1 is not a finite", __LINE__);
    refuse([](Params& p) { p.num_images = 0; }, "num_images 0 is below 1", __LINE__);
    refuse([](Params& p) { p.max_batch = 0; }, "max_batch 0 is below 1", __LINE__);
    refuse([](Params& p) { p.decoder_batch = 0; }, "decoder_batch 0 is below 1", __LINE__);
    refuse([](Params& p) { p.top_k = UINT32_MAX; }, "top_k 4294967295 is above", __LINE__);
    refuse([](Params& p) { p.num_images = UINT32_MAX; }, "images each are more than", __LINE__);
    refuse([](Params& p) { p.num_prompts = 0; }, "no prompt: say what to generate", __LINE__);
    refuse([](Params& p) { p.num_prompts = SIZE_MAX; }, "are more than", __LINE__);
    refuse([](Params& p) { p.struct_size = 3; }, "struct_size=3", __LINE__);
    uint64_t const seeds[2] = {1, 2};
    refuse([&](Params& p) { p.seeds = seeds, p.num_seeds = 2; }, "2 seeds for 1 images", __LINE__);
    ssd_prompt const negative[3] = {{"blue", nullptr, 0}, {"", nullptr, 0}, {"red", nullptr, 0}};
    auto const set = [&](Params& p, size_t count) {
        p.negative_prompts = negative, p.num_negative_prompts = count;
    };
    refuse([&](Params& p) { set(p, 3); }, "3 negative prompts for 1 prompts", __LINE__);
    refuse([&](Params& p) { set(p, 1), p.cfg_scale = 1; }, "does nothing at cfg_scale 1", __LINE__);
    ssd_prompt const broken{"\xFF", nullptr, 0};
    refuse(
        [&](Params& p) {
            p.negative_prompts = &broken, p.num_negative_prompts = 1, p.cfg_scale = 2;
        },
        "the negative prompt '\xFF' is not valid Unicode", __LINE__);
    refuse([](Params& p) { p.lookahead = -2; }, "a window of -2 tokens is outside 2", __LINE__);
    refuse([](Params& p) { p.lookahead = 100'000; }, "a window of 100000 tokens", __LINE__);
    uint8_t small[12];
    refuse([&](Params& p) { p.pixels = small, p.pixels_bytes = sizeof small; },
           "pixels_bytes=12 holds no 1 images", __LINE__);
    REFUSED(ssd_plan(model.get(), 0, 1, nullptr, &error), SSD_INVALID_ARGUMENT, "num_images=0");
    REFUSED(ssd_plan(model.get(), 1, 1, nullptr, &error), SSD_INVALID_ARGUMENT, "plan is NULL");
}

void wrong_prompts() {
    ssd::Model const model(bundle);
    auto const refuse = [&model](ssd_prompt prompt, char const* part, int line) {
        ssd::Request request = request_of(model);
        request.params.prompts = &prompt;
        request.params.num_prompts = 1;
        ssd_error error;
        ssd_generation* generation = nullptr;
        ssd_status const status =
            ssd_generation_create(model.get(), &request.params, &generation, &error);
        refused(status, error, SSD_INVALID_ARGUMENT, part, line);
    };
    std::string const long_prompt(1 << 20, 'x');
    int32_t const short_ids[] = {0, 5};
    int32_t const foreign_ids[] = {0, 999999, 5};
    int32_t const negative_ids[] = {0, -1, 5};
    refuse({"", nullptr, 0}, "the prompt is empty", __LINE__);
    refuse({" \n\t ", nullptr, 0}, "the prompt is empty", __LINE__);
    refuse({"\xFF\xFE", nullptr, 0}, "is not valid Unicode", __LINE__);
    refuse({"\xED\xA0\x80", nullptr, 0}, "is not valid Unicode", __LINE__);
    refuse({long_prompt.c_str(), nullptr, 0}, "tokens long, 64 fit", __LINE__);
    refuse({nullptr, nullptr, 0}, "has neither text nor ids", __LINE__);
    refuse({nullptr, short_ids, 0}, "does not begin and end with", __LINE__);
    refuse({nullptr, short_ids, 2}, "does not begin and end with", __LINE__);
    refuse({nullptr, foreign_ids, 3}, "has the token id 999999", __LINE__);
    refuse({nullptr, negative_ids, 3}, "has the token id -1", __LINE__);
}

void batch_over_the_limit() {  // ONNX Runtime has none: the memory is what refuses
    ssd::Model const model(bundle);
    ssd_memory_plan const plan = model.plan(UINT32_MAX);
    EXPECT(plan.cache_bytes > plan.free_bytes && plan.cache_bytes > plan.num_images);
    EXPECT(model.plan(1).cache_bytes * 2 == model.plan(2).cache_bytes);
    EXPECT(model.plan(1).cache_bytes < model.plan(1).full_cache_bytes);
}

void cancelled_at_every_row() {
    ssd::Model const model(bundle);
    uint32_t const num_rows = model.info().grid_rows;
    for (uint32_t last = 0; last < num_rows; ++last) {
        ssd::Request request = request_of(model);
        request.params.lookahead = last % 2 == 0 ? 0 : SSD_LOOKAHEAD_AUTO;
        uint32_t calls = 0;
        request.on_row = [&](ssd_row_event const& event) {
            ++calls;
            return event.row != last;
        };
        ssd::Generation generation(model, request);
        ssd_error error;
        ssd_status const status = ssd_generate(generation.get(), &error);
        EXPECT(calls == last + 1);
        EXPECT(status == (last + 1 == num_rows ? SSD_OK : SSD_CANCELLED));
        EXPECT(generation.images().num_images == (last + 1 == num_rows ? 1U : 0U));
        EXPECT(ssd_generate(generation.get(), &error) == status);  // and it stays so
    }
}

void cancelled_twice_and_before_and_after() {
    ssd::Model const model(bundle);
    ssd::Generation before(model, request_of(model));
    before.cancel();
    before.cancel();
    REFUSED(ssd_generate(before.get(), &error), SSD_CANCELLED, "cancelled");
    REFUSED(ssd_step_row(before.get(), nullptr, &error), SSD_CANCELLED, "cancelled");
    REFUSED(ssd_cancel(before.get(), 9, &error), SSD_INVALID_ARGUMENT, "when=9");
    ssd::Generation after(model, request_of(model));
    after.run();
    after.cancel();
    EXPECT(ssd_generate(after.get(), nullptr) == SSD_OK && after.images().num_images == 1);
    EXPECT(after.step_row().done == 1);
}

void cancelled_after_the_present_images() {
    ssd::Model const model(bundle);
    ssd::Request request = request_of(model);
    request.params.num_images = 3;
    request.params.max_batch = 1;
    ssd_generation* handle = nullptr;
    request.on_row = [&handle](ssd_row_event const& event) {
        if (event.row == 3) {
            ssd_cancel(handle, SSD_CANCEL_AFTER_IMAGES, nullptr);
        }
        return true;
    };
    ssd::Generation generation(model, request);
    handle = generation.get();
    REFUSED(ssd_generate(handle, &error), SSD_CANCELLED, "cancelled");
    EXPECT(generation.images().num_images == 1);
}

void cancelled_from_another_thread() {
    ssd::Model const model(bundle);
    for (int delay = 0; delay < 12; ++delay) {
        ssd::Request request = request_of(model);
        request.params.num_images = 2;
        request.params.max_batch = 1;
        request.params.preview = delay % 2;
        std::atomic<bool> started{false};
        request.on_row = [&started](ssd_row_event const&) { return started = true; };
        ssd::Generation generation(model, request);
        std::thread canceller([&] {
            while (delay > 0 && !started) {
                std::this_thread::yield();
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(7 * delay));
            generation.cancel();
            generation.cancel();
        });
        ssd_error error;
        ssd_status const status = ssd_generate(generation.get(), &error);
        canceller.join();
        EXPECT(status == SSD_CANCELLED || status == SSD_OK);
    }
}

void callbacks_that_throw() {
    ssd::Model const model(bundle);
    ssd::Request request = request_of(model);
    request.on_row = [](ssd_row_event const&) -> bool { throw std::runtime_error("out of ink"); };
    ssd::Generation generation(model, request);
    try {
        generation.run();
        EXPECT(false);
    } catch (std::runtime_error const& error) {
        EXPECT(std::string(error.what()) == "out of ink");
    }
    // Past the C interface, without the wrapper that catches it.
    ssd_prompt const prompt{"a red circle", nullptr, 0};
    auto const refuse = [&](ssd_row_callback callback, char const* part, int line) {
        ssd_generate_params params = request.params;
        params.prompts = &prompt;
        params.num_prompts = 1;
        params.on_row = callback;
        ssd_generation* raw = nullptr;
        ssd_error error;
        EXPECT(ssd_generation_create(model.get(), &params, &raw, &error) == SSD_OK);
        ssd_status const status = ssd_generate(raw, &error);
        refused(status, error, SSD_CALLBACK_FAILED, part, line);
        ssd_generation_destroy(raw);
    };
    refuse([](ssd_row_event const*, void*) -> int { throw std::runtime_error("no paper"); },
           "threw an exception (no paper)", __LINE__);
    refuse([](ssd_row_event const*, void*) -> int { throw 3; }, "threw an exception", __LINE__);
}

void calls_inside_a_callback() {
    ssd::Model const model(bundle);
    ssd::Request request = request_of(model);
    ssd_generation* handle = nullptr;
    request.on_row = [&handle](ssd_row_event const& event) {
        if (event.row == 1) {
            REFUSED(ssd_generate(handle, &error), SSD_BUSY, "in use by another call");
            REFUSED(ssd_step_row(handle, nullptr, &error), SSD_BUSY, "in use by another call");
            ssd_images images{};
            images.struct_size = sizeof images;
            EXPECT(ssd_generation_images(handle, &images, nullptr) == SSD_OK);
            ssd_cache_report report{};
            report.struct_size = sizeof report;
            EXPECT(ssd_cache_bytes(handle, &report, nullptr) == SSD_OK && report.bytes > 0);
            std::thread([handle] {
                REFUSED(ssd_step_row(handle, nullptr, &error), SSD_BUSY, "in use");
            }).join();
        }
        return event.row < 2;
    };
    ssd::Generation generation(model, request);
    handle = generation.get();
    REFUSED(ssd_cache_bytes(handle, nullptr, &error), SSD_INVALID_ARGUMENT, "before the first row");
    EXPECT(ssd_generate(handle, nullptr) == SSD_CANCELLED);
}

void destroyed_in_any_order() {
    ssd_model_params params;
    ssd_model_params_init(&params, sizeof params);
    params.bundle = bundle.c_str();
    ssd_model* model = nullptr;
    EXPECT(ssd_model_create(&params, &model, nullptr) == SSD_OK);
    ssd_generate_params wanted;
    EXPECT(ssd_generate_params_init(&wanted, sizeof wanted, model, nullptr) == SSD_OK);
    ssd_prompt const prompt{"a red circle", nullptr, 0};
    wanted.prompts = &prompt;
    wanted.num_prompts = 1;
    ssd_generation* first = nullptr;
    ssd_generation* second = nullptr;
    EXPECT(ssd_generation_create(model, &wanted, &first, nullptr) == SSD_OK);
    EXPECT(ssd_generation_create(model, &wanted, &second, nullptr) == SSD_OK);
    ssd_model_destroy(model);  // the generations keep what they need
    EXPECT(ssd_step_row(first, nullptr, nullptr) == SSD_OK);
    EXPECT(ssd_step_row(second, nullptr, nullptr) == SSD_OK);
    ssd_generation_destroy(first);
    EXPECT(ssd_step_row(second, nullptr, nullptr) == SSD_OK);
    std::thread([second] { ssd_generation_destroy(second); }).join();
}

// Destroys its own handle from inside the callback; the call under way ends as if nothing were.
void destroyed_inside_its_callback() {
    ssd::Model const model(bundle);
    ssd_generate_params params;
    EXPECT(ssd_generate_params_init(&params, sizeof params, model.get(), nullptr) == SSD_OK);
    ssd_prompt const prompt{"a red circle", nullptr, 0};
    ssd_generation* generation = nullptr;
    params.prompts = &prompt;
    params.num_prompts = 1;
    params.user_data = &generation;
    params.on_row = [](ssd_row_event const*, void* user_data) {
        ssd_generation_destroy(*static_cast<ssd_generation**>(user_data));
        return 1;
    };
    EXPECT(ssd_generation_create(model.get(), &params, &generation, nullptr) == SSD_OK);
    EXPECT(ssd_generate(generation, nullptr) == SSD_CANCELLED);
}

void thousand_generations() {
    ssd::Model const model(bundle);
    ssd::Request const request = request_of(model);
    for (int i = 0; i < 1000; ++i) {
        ssd::Generation generation(model, request);
        if (i % 100 == 0) {
            generation.step_row();
        }
    }
}

// Open files or threads of this process.
std::ptrdiff_t num_of_process(char const* what) {
    auto const entries = std::filesystem::directory_iterator(std::string("/proc/self/") + what);
    return std::distance(begin(entries), end(entries));
}

long resident_bytes() {
    long all = 0, resident = 0;  // pages
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * sysconf(_SC_PAGESIZE);
}

// The second load after the first was destroyed, and so on: nothing of one stays.
void models_again_and_again() {
    constexpr int warm = 10;               // loads until the allocator has its memory
    constexpr long most_growth = 8 << 20;  // bytes; 1 MB was seen, however many models
    char const* const count = std::getenv("SSD_MODELS");
    std::ptrdiff_t files = 0, threads = 0;
    long bytes = 0;
    for (int i = 0; i < (count == nullptr ? 100 : std::atoi(count)); ++i) {
        {
            ssd::Model const model(bundle);
            if (i % 25 == 0) {
                ssd::Generation(model, request_of(model)).step_row();
            }
        }
        if (i == warm) {
            files = num_of_process("fd");
            threads = num_of_process("task");
            bytes = resident_bytes();
        }
    }
    EXPECT(num_of_process("fd") == files);
    EXPECT(num_of_process("task") == threads);
    // Under a sanitizer, which SSD_MODELS is for, freed memory stays for a while.
    EXPECT(count != nullptr || resident_bytes() - bytes < most_growth);
}

void two_generations_in_two_threads() {
    ssd::Model const model(bundle);
    ssd::Generation alone(model, request_of(model));
    alone.run();
    ssd::Images const expected = alone.images();
    std::set<std::string> seen;
    std::string drawn[2];
    auto const draw = [&](std::string* into) {
        ssd::Generation generation(model, request_of(model));
        generation.run();
        ssd::Images const images = generation.images();
        size_t const size = size_t{images.width} * images.height * 3;
        into->assign(reinterpret_cast<char const*>(images.pixels), size);
    };
    std::thread first(draw, &drawn[0]);
    std::thread second(draw, &drawn[1]);
    first.join();
    second.join();
    EXPECT(drawn[0] == drawn[1] && !drawn[0].empty());
    EXPECT(std::memcmp(drawn[0].data(), expected.pixels, drawn[0].size()) == 0);
}

void two_models_in_two_threads() {
    auto const draw = [] {
        ssd::Model const model(bundle);
        ssd::Generation generation(model, request_of(model));
        generation.step_row();
        generation.step_row();
    };
    std::thread first(draw);
    std::thread second(draw);
    first.join();
    second.join();
}

void pixels_of_the_caller() {
    ssd::Model const model(bundle);
    ssd_model_info const info = model.info();
    std::vector<uint8_t> pixels(size_t{info.width} * info.height * 3 + 1, 0xAB);
    ssd::Request request = request_of(model);
    request.params.pixels = pixels.data();
    request.params.pixels_bytes = pixels.size() - 1;
    ssd::Generation generation(model, request);
    generation.run();
    EXPECT(generation.images().pixels == pixels.data());
    EXPECT(pixels.back() == 0xAB);
    ssd::Generation own(model, request_of(model));
    own.run();
    EXPECT(std::memcmp(own.images().pixels, pixels.data(), pixels.size() - 1) == 0);
}

void png_files() {
    uint8_t const pixels[12] = {255, 0, 0, 0, 255, 0, 0, 0, 255, 1, 2, 3};
    char const* const texts[] = {"prompt", "\xC3\xA9t\xC3\xA9"};
    REFUSED(ssd_write_png("/nowhere/at/all.png", pixels, 2, 2, nullptr, 0, &error), SSD_IO_ERROR,
            "cannot write /nowhere/at/all.png");
    REFUSED(ssd_write_png("/dev/full", pixels, 0, 2, nullptr, 0, &error), SSD_INVALID_ARGUMENT,
            "width=0");
    REFUSED(ssd_write_png("x.png", pixels, 2, 2, nullptr, 1, &error), SSD_INVALID_ARGUMENT,
            "texts");
    EXPECT(ssd_write_png("ssd_misuse.png", pixels, 2, 2, texts, 1, nullptr) == SSD_OK);
}

void device_list() {
    std::vector<ssd_device> const devices = ssd::devices();
    EXPECT(!devices.empty());
    for (ssd_device const& device : devices) {
        EXPECT(device.available == 1 || device.reason[0] != '\0');
        std::fprintf(stderr, "%s %s %d: %s %s\n", device.backend, device.provider, device.index,
                     device.name, device.reason);
    }
}

std::map<std::string, void (*)()> const tests = {
#define TEST(name) {#name, name}
    TEST(null_handles),
    TEST(wrong_models),
    TEST(structs_of_other_versions),
    TEST(generation_by_an_earlier_program),
    TEST(wrong_numbers),
    TEST(wrong_prompts),
    TEST(batch_over_the_limit),
    TEST(cancelled_at_every_row),
    TEST(cancelled_twice_and_before_and_after),
    TEST(cancelled_after_the_present_images),
    TEST(cancelled_from_another_thread),
    TEST(callbacks_that_throw),
    TEST(calls_inside_a_callback),
    TEST(destroyed_in_any_order),
    TEST(destroyed_inside_its_callback),
    TEST(thousand_generations),
    TEST(models_again_and_again),
    TEST(two_generations_in_two_threads),
    TEST(two_models_in_two_threads),
    TEST(pixels_of_the_caller),
    TEST(png_files),
    TEST(device_list),
#undef TEST
};

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        for (auto const& [name, test] : tests) {
            std::printf("%s\n", name.c_str());
        }
        return 0;
    }
    bundle = argv[1];
    std::set<std::string> const wanted(argv + 2, argv + argc);
    for (auto const& [name, test] : tests) {
        if (!wanted.empty() && wanted.count(name) == 0) {
            continue;
        }
        int const before = num_failed;
        try {
            test();
        } catch (std::exception const& error) {
            std::printf("%s\n", error.what());
            ++num_failed;
        }
        std::printf("%s %s\n", num_failed == before ? "passed" : "FAILED", name.c_str());
        std::fflush(stdout);
    }
    return num_failed == 0 ? 0 : 1;
}
