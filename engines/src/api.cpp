// The C interface: pointers and sizes are checked here, exceptions become a status and a sentence.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "failure.h"
#include "generation.h"
#include "model.h"
#include "png_file.h"
#include "ssd_runtime/ssd_runtime.h"

#define SSD_TEXT_OF(number) #number
#define SSD_TEXT(number) SSD_TEXT_OF(number)

struct ssd_model {
    std::shared_ptr<ssd_runtime::Model> model;
};

struct ssd_generation {
    std::shared_ptr<ssd_runtime::Generation> generation;
};

namespace ssd_runtime {
namespace {

constexpr size_t least_struct_bytes = 2 * sizeof(uint32_t), most_struct_bytes = 4096;

ssd_status report(ssd_error* error, ssd_status status, char const* message) noexcept {
    if (error != nullptr) {
        error->status = status;
        size_t const size = std::min(std::strlen(message), sizeof error->message - 1);
        std::memcpy(error->message, message, size);
        error->message[size] = '\0';
        std::replace(error->message, error->message + size, '\n', ' ');
    }
    return status;
}

// Runs work; what it throws becomes a status and a sentence.
template <typename Work>
ssd_status guarded(ssd_error* error, Work&& work) noexcept {
    try {
        work();
        return report(error, SSD_OK, "");
    } catch (Failure const& failure) {
        return report(error, failure.status(), failure.what());
    } catch (std::bad_alloc const&) {
        return report(error, SSD_OUT_OF_MEMORY,
                      "out of memory: generate fewer images at the same time, or export with a "
                      "smaller budget or --weights int4");
    } catch (std::exception const& fault) {
        return report(error, SSD_INTERNAL_ERROR, fault.what());
    } catch (...) {
        return report(error, SSD_INTERNAL_ERROR, "an unknown exception; please report this");
    }
}

template <typename Handle>
Handle& checked(Handle* handle, char const* what) {
    if (handle == nullptr) {
        fail(SSD_INVALID_ARGUMENT, what, " is NULL");
    }
    return *handle;
}

// What a program passes in, of an older or newer version of the struct.
template <typename Struct>
Struct read_struct(Struct const* given, char const* what) {
    size_t const size = checked(given, what).struct_size;
    if (size < least_struct_bytes || size > most_struct_bytes) {
        fail(SSD_INVALID_ARGUMENT, what, "->struct_size=", size, " is no size of it; call ", what,
             "_init, or set it to sizeof *", what);
    }
    Struct read{};
    std::memcpy(&read, given, std::min(size, sizeof read));
    auto const* bytes = reinterpret_cast<unsigned char const*>(given);
    if (std::any_of(bytes + std::min(size, sizeof read), bytes + size,
                    [](unsigned char byte) { return byte != 0; })) {
        fail(SSD_INVALID_ARGUMENT, what, " has fields that ssd_runtime ", ssd_version(),
             " does not know; use a newer library");
    }
    return read;
}

// What a program gets, in as much room as its version of the struct has: what a later version has
// beside it is zero.
template <typename Struct>
void write_struct(Struct* target, size_t size, Struct value, char const* what) {
    checked(target, what);
    if (size < least_struct_bytes || size > most_struct_bytes) {
        fail(SSD_INVALID_ARGUMENT, what, "->struct_size=", size,
             " is no size of it; set it to sizeof *", what);
    }
    value.struct_size = static_cast<uint32_t>(size);
    auto* const bytes = reinterpret_cast<char*>(target);
    size_t const known = std::min(size, sizeof value);
    std::memcpy(bytes, &value, known);
    std::memset(bytes + known, 0, size - known);
}

template <typename Struct>
void write_struct(Struct* target, Struct const& value, char const* what) {
    write_struct(target, checked(target, what).struct_size, value, what);
}

std::string or_empty(char const* text) { return text == nullptr ? "" : text; }

}  // namespace
}  // namespace ssd_runtime

using namespace ssd_runtime;

extern "C" {

char const* ssd_version(void) {
    return SSD_TEXT(SSD_RUNTIME_VERSION_MAJOR) "." SSD_TEXT(SSD_RUNTIME_VERSION_MINOR) "." SSD_TEXT(
        SSD_RUNTIME_VERSION_PATCH);
}

char const* ssd_status_name(ssd_status status) {
    switch (status) {
    case SSD_OK: return "ok";
    case SSD_CANCELLED: return "cancelled";
    case SSD_INVALID_ARGUMENT: return "invalid argument";
    case SSD_BAD_BUNDLE: return "bad bundle";
    case SSD_UNAVAILABLE: return "unavailable";
    case SSD_OUT_OF_MEMORY: return "out of memory";
    case SSD_BUSY: return "busy";
    case SSD_CALLBACK_FAILED: return "callback failed";
    case SSD_IO_ERROR: return "cannot write";
    case SSD_INTERNAL_ERROR: return "internal error";
    }
    return "unknown status";
}

ssd_status ssd_devices(ssd_device* devices, size_t capacity, size_t* count, ssd_error* error) {
    return guarded(error, [&] {
        std::vector<ssd_device> const found = list_devices();
        checked(count, "count") = found.size();
        if (capacity == 0) {
            return;
        }
        size_t const stride = checked(devices, "devices").struct_size;
        for (size_t i = 0; i < std::min(capacity, found.size()); ++i) {
            auto* place =
                reinterpret_cast<ssd_device*>(reinterpret_cast<char*>(devices) + i * stride);
            place->struct_size = static_cast<uint32_t>(stride);
            write_struct(place, found[i], "devices");
        }
    });
}

void ssd_model_params_init(ssd_model_params* params, size_t struct_size) {
    if (params != nullptr) {
        guarded(nullptr, [&] { write_struct(params, struct_size, ssd_model_params{}, "params"); });
    }
}

ssd_status ssd_model_create(ssd_model_params const* params, ssd_model** model, ssd_error* error) {
    return guarded(error, [&] {
        checked(model, "model") = nullptr;
        ssd_model_params const given = read_struct(params, "params");
        if (given.bundle == nullptr || *given.bundle == '\0') {
            fail(SSD_INVALID_ARGUMENT,
                 "params->bundle is empty: give the folder that `ssd-export "
                 "export` wrote");
        }
        if (given.num_threads < 0 || given.num_threads > 4096) {
            fail(SSD_INVALID_ARGUMENT, "num_threads=", given.num_threads,
                 " is no number of threads; use 0 to let the library choose");
        }
        auto opened = std::make_shared<Model>(ModelRequest{given.bundle, or_empty(given.backend),
                                                           or_empty(given.provider), given.device,
                                                           given.num_threads});
        *model = new ssd_model{std::move(opened)};
    });
}

void ssd_model_destroy(ssd_model* model) { delete model; }

ssd_status ssd_model_describe(ssd_model const* model, ssd_model_info* info, ssd_error* error) {
    return guarded(error, [&] {
        ssd_model_info found{};
        checked(model, "model").model->describe(found);
        write_struct(info, found, "info");
    });
}

ssd_status ssd_encode(ssd_model const* model, char const* prompt, int32_t* ids, size_t capacity,
                      size_t* count, ssd_error* error) {
    return guarded(error, [&] {
        PromptEncoder const& encoder = checked(model, "model").model->prompts();
        std::vector<int32_t> const row =
            encoder.encode(checked_text(&checked(prompt, "prompt"), "prompt"), "prompt");
        checked(count, "count") = row.size();
        if (capacity > 0) {
            std::copy_n(row.begin(), std::min(capacity, row.size()), &checked(ids, "ids"));
        }
    });
}

ssd_status ssd_plan(ssd_model const* model, uint32_t num_images, uint32_t decoder_batch,
                    ssd_memory_plan* plan, ssd_error* error) {
    return guarded(error, [&] {
        if (num_images < 1 || decoder_batch < 1) {
            fail(SSD_INVALID_ARGUMENT, "num_images=", num_images, ", decoder_batch=", decoder_batch,
                 ": use 1 or more");
        }
        ssd_memory_plan made{};
        checked(model, "model").model->plan(num_images, decoder_batch, made);
        write_struct(plan, made, "plan");
    });
}

ssd_status ssd_generate_params_init(ssd_generate_params* params, size_t struct_size,
                                    ssd_model const* model, ssd_error* error) {
    return guarded(error, [&] {
        ssd_generate_params filled{};
        Config const& config = checked(model, "model").model->config();
        filled.num_images = 1;
        filled.cfg_scale = config.cfg_scale;
        filled.temperature = config.temperature;
        filled.max_batch = 16;
        filled.decoder_batch = 1;
        write_struct(params, struct_size, filled, "params");
    });
}

ssd_status ssd_generation_create(ssd_model* model, ssd_generate_params const* params,
                                 ssd_generation** generation, ssd_error* error) {
    return guarded(error, [&] {
        checked(generation, "generation") = nullptr;
        auto made = std::make_shared<Generation>(checked(model, "model").model,
                                                 read_struct(params, "params"));
        *generation = new ssd_generation{std::move(made)};
    });
}

void ssd_generation_destroy(ssd_generation* generation) { delete generation; }

ssd_status ssd_generate(ssd_generation* generation, ssd_error* error) {
    return guarded(error, [&] {
        // Its own owner: a callback may destroy the handle.
        std::shared_ptr<Generation> const running = checked(generation, "generation").generation;
        Generation::Use const use(*running);
        running->run();
    });
}

ssd_status ssd_step_row(ssd_generation* generation, ssd_row_event* event, ssd_error* error) {
    return guarded(error, [&] {
        std::shared_ptr<Generation> const running = checked(generation, "generation").generation;
        Generation::Use const use(*running);
        ssd_row_event row{};
        running->step_row(row);
        if (event != nullptr) {
            write_struct(event, row, "event");
        }
    });
}

ssd_status ssd_cancel(ssd_generation* generation, int32_t when, ssd_error* error) {
    return guarded(error, [&] {
        if (when != SSD_CANCEL_NOW && when != SSD_CANCEL_AFTER_IMAGES) {
            fail(SSD_INVALID_ARGUMENT, "when=", when,
                 " is neither SSD_CANCEL_NOW nor SSD_CANCEL_AFTER_IMAGES");
        }
        checked(generation, "generation").generation->cancel(when);
    });
}

ssd_status ssd_generation_images(ssd_generation const* generation, ssd_images* images,
                                 ssd_error* error) {
    return guarded(error, [&] {
        Generation const& finished = *checked(generation, "generation").generation;
        Generation::Use const use(finished, true);
        write_struct(images, finished.images(), "images");
    });
}

ssd_status ssd_cache_bytes(ssd_generation const* generation, ssd_cache_report* report,
                           ssd_error* error) {
    return guarded(error, [&] {
        Generation const& counted = *checked(generation, "generation").generation;
        Generation::Use const use(counted, true);
        write_struct(report, counted.cache_report(), "report");
    });
}

ssd_status ssd_write_png(char const* path, uint8_t const* pixels, uint32_t width, uint32_t height,
                         char const* const* texts, size_t num_texts, ssd_error* error) {
    return guarded(error, [&] {
        if (width < 1 || height < 1 || width > 1U << 16U || height > 1U << 16U) {
            fail(SSD_INVALID_ARGUMENT, "width=", width, ", height=", height,
                 ": no image has that size; use 1 to 65536");
        }
        std::vector<std::pair<std::string, std::string>> pairs;
        for (size_t i = 0; i < num_texts; ++i) {
            checked(texts, "texts");
            pairs.emplace_back(&checked(texts[2 * i], "a key of texts"),
                               &checked(texts[2 * i + 1], "a value of texts"));
        }
        write_png(&checked(path, "path"), &checked(pixels, "pixels"), width, height, pairs);
    });
}

}  // extern "C"
