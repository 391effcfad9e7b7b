// ssd_runtime for C++17: the same library with owners, exceptions and functions as callbacks.
//
//   ssd::Model model("bundles/demo");
//   auto generation = ssd::Generation(model, ssd::Request(model, {"a red circle"})).run();
#ifndef SSD_RUNTIME_HPP
#define SSD_RUNTIME_HPP

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ssd_runtime/ssd_runtime.h"

namespace ssd {

// A status other than SSD_OK, with the library's sentence.
class Error : public std::runtime_error {
public:
    explicit Error(ssd_error const& error)
        : std::runtime_error(error.message), status_(error.status) {}
    ssd_status status() const noexcept { return status_; }

private:
    ssd_status status_;
};

inline void check(ssd_status status, ssd_error const& error) {
    if (status != SSD_OK) {
        throw Error(error);
    }
}

// The places where the library can generate, the unavailable ones with their reasons.
inline std::vector<ssd_device> devices() {
    ssd_error error;
    size_t count = 0;
    check(ssd_devices(nullptr, 0, &count, &error), error);
    std::vector<ssd_device> found(count);
    if (count > 0) {
        found[0].struct_size = sizeof(ssd_device);
        check(ssd_devices(found.data(), count, &count, &error), error);
    }
    return found;
}

// A bundle with its weights; any number of threads may use one at the same time. Move-only.
class Model {
public:
    explicit Model(std::string const& bundle) : Model(params_for(bundle)) {}
    explicit Model(ssd_model_params const& params) {
        ssd_error error;
        ssd_model* model = nullptr;
        check(ssd_model_create(&params, &model, &error), error);
        model_.reset(model);
    }

    ssd_model* get() const noexcept { return model_.get(); }
    ssd_model_info info() const {
        ssd_error error;
        ssd_model_info info{};
        info.struct_size = sizeof info;
        check(ssd_model_describe(get(), &info, &error), error);
        return info;
    }
    ssd_memory_plan plan(uint32_t num_images, uint32_t decoder_batch = 1) const {
        ssd_error error;
        ssd_memory_plan plan{};
        plan.struct_size = sizeof plan;
        check(ssd_plan(get(), num_images, decoder_batch, &plan, &error), error);
        return plan;
    }

private:
    static ssd_model_params params_for(std::string const& bundle) {
        ssd_model_params params;
        ssd_model_params_init(&params);
        params.bundle = bundle.c_str();
        return params;
    }

    struct Destroy {
        void operator()(ssd_model* model) const noexcept { ssd_model_destroy(model); }
    };
    std::unique_ptr<ssd_model, Destroy> model_;
};

// What to generate; `params` holds the numbers. on_row returns false to cancel, and may throw.
struct Request {
    Request(Model const& model, std::vector<std::string> texts) : prompts(std::move(texts)) {
        ssd_error error;
        check(ssd_generate_params_init(&params, model.get(), &error), error);
    }

    std::vector<std::string> prompts;
    ssd_generate_params params{};
    std::function<bool(ssd_row_event const&)> on_row;
};

using Images = ssd_images;

// The images of one request; owns the pixels. Move-only.
class Generation {
public:
    Generation(Model const& model, Request const& request)
        : callback_(std::make_unique<Callback>(Callback{request.on_row, nullptr})) {
        std::vector<ssd_prompt> prompts;
        for (std::string const& text : request.prompts) {
            prompts.push_back({text.c_str(), nullptr, 0});
        }
        ssd_generate_params params = request.params;
        if (!prompts.empty()) {
            params.prompts = prompts.data();
            params.num_prompts = prompts.size();
        }
        if (request.on_row) {
            params.on_row = call;
            params.user_data = callback_.get();
        }
        ssd_error error;
        ssd_generation* generation = nullptr;
        check(ssd_generation_create(model.get(), &params, &generation, &error), error);
        generation_.reset(generation);
    }

    ssd_generation* get() const noexcept { return generation_.get(); }
    // Generates everything. Throws Error, or what on_row threw.
    Generation& run() & {
        ssd_error error;
        ssd_status const status = ssd_generate(get(), &error);
        if (callback_->thrown) {
            std::rethrow_exception(std::exchange(callback_->thrown, nullptr));
        }
        check(status, error);
        return *this;
    }
    Generation run() && { return std::move(run()); }
    // Generates one grid row; event.done says when nothing is left.
    ssd_row_event step_row() {
        ssd_error error;
        ssd_row_event event{};
        event.struct_size = sizeof event;
        check(ssd_step_row(get(), &event, &error), error);
        return event;
    }
    // From any thread.
    void cancel(ssd_cancel_when when = SSD_CANCEL_NOW) { ssd_cancel(get(), when, nullptr); }
    // Those that are finished; valid as long as this object.
    Images images() const {
        ssd_error error;
        Images images{};
        images.struct_size = sizeof images;
        check(ssd_generation_images(get(), &images, &error), error);
        return images;
    }
    ssd_cache_report cache_bytes() const {
        ssd_error error;
        ssd_cache_report report{};
        report.struct_size = sizeof report;
        check(ssd_cache_bytes(get(), &report, &error), error);
        return report;
    }

private:
    struct Callback {
        std::function<bool(ssd_row_event const&)> on_row;
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

    struct Destroy {
        void operator()(ssd_generation* gone) const noexcept { ssd_generation_destroy(gone); }
    };
    std::unique_ptr<Callback> callback_;
    std::unique_ptr<ssd_generation, Destroy> generation_;
};

}  // namespace ssd

#endif  // SSD_RUNTIME_HPP
