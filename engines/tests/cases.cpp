// Runs the cases of a JSON file and writes what they made, for tests/engines to compare.
//
//   ssd_cases cases.json results.bin
//
// cases.json: an array of objects with `bundle` and any of prompts, ids, negative_prompt,
// negative_ids, embeddings (flat) and embedding_width, seed, seeds, num_images, cfg_scale,
// temperature, top_k, max_batch, decoder_batch, preview, lookahead, num_threads, backend, provider,
// device, own_loop, first_row, or `bundle` and `encode` (an array of texts). results.bin: for each
// case a line of JSON, then the tokens (int32) and pixels (uint8) that the line counts.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>

#include <nlohmann/json.hpp>

#include "ssd_runtime/ssd_runtime.hpp"

namespace {

using Json = nlohmann::json;

double seconds_since(std::chrono::steady_clock::time_point began) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

// Peak resident memory of this process; getrusage would count the one that started it, too.
int64_t peak_kilobytes() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
        if (int64_t peak = 0; word == "VmHWM:" && status >> peak) {
            return peak;
        }
    }
    return 0;
}

ssd::Model& model_of(Json const& test) {
    static std::map<std::string, ssd::Model> models;
    if (models.size() > 20) {  // of hundreds of broken bundles
        models.clear();
    }
    std::string const bundle = test.at("bundle");
    int const num_threads = test.value("num_threads", 0);
    std::string const backend = test.value("backend", std::string());
    std::string const provider = test.value("provider", std::string());
    int const device = test.value("device", 0);
    std::string const key = bundle + " " + std::to_string(num_threads) + " " + backend + provider +
                            std::to_string(device);
    auto found = models.find(key);
    if (found == models.end()) {
        ssd_model_params params;
        ssd_model_params_init(&params, sizeof params);
        params.bundle = bundle.c_str();
        params.num_threads = num_threads;
        params.backend = backend.c_str();
        params.provider = provider.c_str();
        params.device = device;
        found = models.emplace(key, ssd::Model(params)).first;
    }
    return found->second;
}

// What the parameters of a request point to.
struct Lists {
    std::vector<std::vector<int32_t>> ids, negative_ids;
    std::vector<ssd_prompt> prompts, negative_prompts;
    std::vector<uint64_t> seeds;
    std::vector<std::vector<float>> captions;
    std::vector<float const*> embeddings;
    std::vector<size_t> embedding_tokens;
};

std::vector<ssd_prompt> prompts_of(std::vector<std::vector<int32_t>> const& ids) {
    std::vector<ssd_prompt> prompts;
    for (auto const& row : ids) {
        prompts.push_back({nullptr, row.empty() ? nullptr : row.data(), row.size()});
    }
    return prompts;
}

ssd::Request request_of(ssd::Model const& model, Json const& test, Lists& lists) {
    ssd::Request request(model, test.value("prompts", std::vector<std::string>()));
    request.negative_prompts = test.value("negative_prompt", request.negative_prompts);
    ssd_generate_params& params = request.params;
    lists.ids = test.value("ids", lists.ids);
    lists.prompts = prompts_of(lists.ids);
    params.prompts = lists.prompts.data();
    params.num_prompts = lists.prompts.size();
    lists.negative_ids = test.value("negative_ids", lists.negative_ids);
    lists.negative_prompts = prompts_of(lists.negative_ids);
    params.negative_prompts = lists.negative_prompts.data();
    params.num_negative_prompts = lists.negative_prompts.size();
    lists.captions = test.value("embeddings", lists.captions);
    for (auto const& caption : lists.captions) {
        lists.embeddings.push_back(caption.data());
        lists.embedding_tokens.push_back(caption.size() / test.at("embedding_width").get<size_t>());
    }
    if (!lists.captions.empty()) {
        params.num_prompts = lists.captions.size();
        params.embeddings = lists.embeddings.data();
        params.embedding_tokens = lists.embedding_tokens.data();
    }
    params.seed = test.value("seed", uint64_t{0});
    lists.seeds = test.value("seeds", lists.seeds);
    params.seeds = lists.seeds.empty() ? nullptr : lists.seeds.data();
    params.num_seeds = lists.seeds.size();
    params.num_images = test.value("num_images", 1U);
    params.cfg_scale = test.value("cfg_scale", params.cfg_scale);
    params.temperature = test.value("temperature", params.temperature);
    params.top_k = test.value("top_k", 0U);
    params.max_batch = test.value("max_batch", params.max_batch);
    params.decoder_batch = test.value("decoder_batch", params.decoder_batch);
    params.preview = test.value("preview", 0);
    params.lookahead = test.value("lookahead", 0);
    return request;
}

Json event_of(ssd_row_event const& event) {
    uint64_t sum = 0;
    size_t const size = size_t{event.num_images} * event.width * event.height * 3;
    for (size_t i = 0; event.pixels != nullptr && i < size; ++i) {
        sum += event.pixels[i] * (i % 251 + 1);
    }
    return {event.row, event.first_image, event.num_images, event.done, sum};
}

void generate(Json const& test, std::ostream& out) {
    ssd::Model& model = model_of(test);
    Lists lists;
    ssd::Request request = request_of(model, test, lists);
    Json events = Json::array();
    uint32_t passes = 0;
    std::vector<double> row_seconds;
    auto const began = std::chrono::steady_clock::now();
    request.on_row = [&](ssd_row_event const& event) {
        row_seconds.push_back(seconds_since(began));
        events.push_back(event_of(event));
        passes = event.passes;
        return true;
    };
    ssd::Generation generation(model, request);
    if (test.value("first_row", false)) {
        generation.step_row();
    } else if (test.value("own_loop", false)) {
        for (int32_t done = 0; done == 0;) {
            ssd_row_event const event = generation.step_row();
            events.push_back(event_of(event));
            passes = event.passes;
            done = event.done;
        }
    } else {
        generation.run();
    }
    double const seconds = seconds_since(began);
    ssd::Images const images = generation.images();
    ssd_cache_report const cache = generation.cache_bytes();
    ssd_model_info const info = model.info();
    size_t const num_tokens = size_t{images.num_images} * images.num_tokens;
    size_t const num_pixels = size_t{images.num_images} * images.width * images.height * 3;
    out << Json{{"images", images.num_images},
                {"tokens", num_tokens},
                {"pixels", num_pixels},
                {"events", events},
                {"passes", passes},
                {"seconds", seconds},
                {"cache_bytes", cache.bytes},
                {"tokens_evicted", cache.tokens_evicted},
                {"step_is_captured", cache.step_is_captured},
                {"planned_cache_bytes", model.plan(cache.num_images).cache_bytes},
                {"row_seconds", row_seconds},
                {"decodes_in_int8", info.decodes_in_int8},
                {"why_float_decoder", info.why_float_decoder},
                {"peak_kilobytes", peak_kilobytes()}}
        << "\n";
    out.write(reinterpret_cast<char const*>(images.tokens),
              static_cast<std::streamsize>(num_tokens * sizeof(int32_t)));
    out.write(reinterpret_cast<char const*>(images.pixels),
              static_cast<std::streamsize>(num_pixels));
}

void encode(Json const& test, std::ostream& out) {
    ssd::Model& model = model_of(test);
    Json rows = Json::array();
    for (std::string const text : test.at("encode")) {
        std::vector<int32_t> ids(100'000);
        size_t count = 0;
        ssd_error error;
        ssd_status const status =
            ssd_encode(model.get(), text.c_str(), ids.data(), ids.size(), &count, &error);
        ids.resize(count);
        rows.push_back(status == SSD_OK ? Json(ids) : Json(error.message));
    }
    out << Json{{"rows", rows}} << "\n";
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: ssd_cases cases.json results.bin\n");
        return 2;
    }
    std::ifstream in(argv[1]);
    std::ofstream out(argv[2], std::ios::binary);
    for (Json const& test : Json::parse(in)) {
        try {
            test.contains("encode") ? encode(test, out) : generate(test, out);
        } catch (ssd::Error const& error) {
            out << Json{{"status", error.status}, {"error", error.what()}} << "\n";
        }
    }
    return out.good() ? 0 : 1;
}
