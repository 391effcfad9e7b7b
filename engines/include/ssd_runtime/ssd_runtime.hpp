// ssd_runtime for C++17: the same library with owners, exceptions and functions as callbacks.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ssd_runtime/ssd_runtime.h"

namespace ssd {

using Images = ssd_images;
using RowCallback = std::function<bool(ssd_row_event const&)>;

// A status other than SSD_OK, with the library's sentence.
struct Error : std::runtime_error {
    explicit Error(ssd_error const& e) : std::runtime_error(e.message), status(e.status) {}
    ssd_status status;
};

inline void check(ssd_status status, ssd_error const& error) {
    if (status != SSD_OK) {
        throw Error(error);
    }
}

// What a function of the library says of a handle.
template <typename Struct, typename Fill, typename... Asked>
Struct filled(Fill fill, Asked... asked) {
    ssd_error error;
    Struct made{};
    made.struct_size = sizeof made;
    check(fill(asked..., &made, &error), error);
    return made;
}

// The places where the library can generate, the unavailable ones with their reasons.
inline std::vector<ssd_device> devices() {
    ssd_error error;
    size_t count = 0;
    check(ssd_devices(nullptr, 0, &count, &error), error);
    std::vector<ssd_device> found(count, {sizeof(ssd_device), 0, 0, {}, {}, {}, {}, 0, 0});
    check(ssd_devices(found.data(), count, &count, &error), error);
    return found;
}

// A bundle with its weights; any number of threads may use one at the same time. Move-only.
class Model {
public:
    explicit Model(std::string const& bundle)
        : Model({sizeof(ssd_model_params), 0, bundle.c_str(), {}, {}, 0}) {}
    explicit Model(ssd_model_params const& params) {
        ssd_error error;
        ssd_model* model = nullptr;
        check(ssd_model_create(&params, &model, &error), error);
        model_.reset(model);
    }

    ssd_model* get() const noexcept { return model_.get(); }
    ssd_model_info info() const { return filled<ssd_model_info>(ssd_model_describe, get()); }
    ssd_memory_plan plan(uint32_t num_images, uint32_t decoder_batch = 1) const {
        return filled<ssd_memory_plan>(ssd_plan, get(), num_images, decoder_batch);
    }

private:
    std::unique_ptr<ssd_model, void (*)(ssd_model*)> model_{nullptr, ssd_model_destroy};
};

// What to generate; `params` holds the numbers. on_row returns false to cancel, and may throw.
struct Request {
    Request(Model const& model, std::vector<std::string> texts) : prompts(std::move(texts)) {
        ssd_error error;
        check(ssd_generate_params_init(&params, sizeof params, model.get(), &error), error);
    }
    std::vector<std::string> prompts, negative_prompts;
    ssd_generate_params params{};
    RowCallback on_row;
};

// The images of one request; owns the pixels. Move-only.
class Generation {
public:
    Generation(Model const& model, Request const& request)
        : callback_(new Callback{request.on_row, nullptr}) {
        ssd_generate_params params = request.params;
        auto const prompts = set(request.prompts, params.prompts, params.num_prompts);
        auto const negative_prompts =
            set(request.negative_prompts, params.negative_prompts, params.num_negative_prompts);
        params.on_row = request.on_row ? call : nullptr;
        params.user_data = callback_.get();
        ssd_error error;
        ssd_generation* generation = nullptr;
        check(ssd_generation_create(model.get(), &params, &generation, &error), error);
        generation_.reset(generation);
    }

    ssd_generation* get() const noexcept { return generation_.get(); }
    // Generates everything. Throws Error, or what on_row threw.
    void run() {
        ssd_error error;
        ssd_status const status = ssd_generate(get(), &error);
        if (callback_->thrown) {
            std::rethrow_exception(std::exchange(callback_->thrown, nullptr));
        }
        check(status, error);
    }
    // Generates one grid row, until event.done.
    ssd_row_event step_row() { return filled<ssd_row_event>(ssd_step_row, get()); }
    void cancel(ssd_cancel_when when = SSD_CANCEL_NOW) { ssd_cancel(get(), when, nullptr); }
    // Those that are finished; valid as long as this object.
    Images images() const { return filled<Images>(ssd_generation_images, get()); }
    auto cache_bytes() const { return filled<ssd_cache_report>(ssd_cache_bytes, get()); }

private:
    // Makes texts the prompts of the parameters, unless there are none.
    static std::vector<ssd_prompt> set(std::vector<std::string> const& texts,
                                       ssd_prompt const*& prompts, size_t& num_prompts) {
        std::vector<ssd_prompt> made;
        for (std::string const& text : texts) {
            made.push_back({text.c_str(), nullptr, 0});
        }
        prompts = made.empty() ? prompts : made.data();
        num_prompts = made.empty() ? num_prompts : made.size();
        return made;
    }
    struct Callback {
        RowCallback on_row;
        std::exception_ptr thrown;
    };
    static int call(ssd_row_event const* event, void* user_data) noexcept {
        auto& callback = *static_cast<Callback*>(user_data);
        try {
            return callback.on_row(*event) ? 0 : 1;
        } catch (...) {
            callback.thrown = std::current_exception();
            return 1;
        }
    }

    std::unique_ptr<Callback> callback_;
    std::unique_ptr<ssd_generation, void (*)(ssd_generation*)> generation_{nullptr,
                                                                           ssd_generation_destroy};
};

}  // namespace ssd
