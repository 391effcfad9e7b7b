#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "failure.h"

namespace ssd_runtime {

// Why a file is not read as JSON.
class NotJson : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// The value of a JSON text. Throws NotJson for what is none, and for one that is nested so deep
// that copying or writing it, which is done by recursion, would overflow the stack.
nlohmann::ordered_json parse_json(std::string_view content);

// An object or array of a JSON file that knows where it stands, so that a wrong value is named by
// its file and its place in it.
class JsonReader {
public:
    // file: for messages. advice: what ends them.
    JsonReader(nlohmann::ordered_json const& value, std::string const& file,
               std::string const& advice)
        : value_(value), file_(file), advice_(advice) {}

    JsonReader operator[](std::string const& key) const {
        if (!value_.is_object()) {
            wrong("an object");
        }
        auto const found = value_.find(key);
        if (found == value_.end()) {
            fail(SSD_BAD_BUNDLE, file_, ": ", place_ + (place_.empty() ? "" : "."), key,
                 " is missing; ", advice_);
        }
        return JsonReader(*found, file_, advice_, place_.empty() ? key : place_ + "." + key);
    }

    bool has(std::string const& key) const { return value_.is_object() && value_.contains(key); }

    int64_t integer(int64_t least, int64_t most = std::numeric_limits<int32_t>::max()) const {
        if (!value_.is_number_integer()) {
            wrong("a whole number");
        }
        bool const is_huge = value_.is_number_unsigned() && value_.get<uint64_t>() > uint64_t{1}
                                                                                         << 62U;
        if (is_huge || value_.get<int64_t>() < least || value_.get<int64_t>() > most) {
            wrong(text(least, " to ", most));
        }
        return value_.get<int64_t>();
    }

    double number() const {
        if (!value_.is_number()) {
            wrong("a number");
        }
        return value_.get<double>();
    }

    bool boolean() const {
        if (!value_.is_boolean()) {
            wrong("true or false");
        }
        return value_.get<bool>();
    }

    std::string string() const {
        if (!value_.is_string()) {
            wrong("text");
        }
        return value_.get<std::string>();
    }

    bool is_string() const { return value_.is_string(); }
    bool is_null() const { return value_.is_null(); }

    // Calls visit(JsonReader) for every element of an array.
    template <typename Visit>
    void each(Visit visit) const {
        if (!value_.is_array()) {
            wrong("a list");
        }
        size_t index = 0;
        for (auto const& element : value_) {
            visit(JsonReader(element, file_, advice_, text(place_, "[", index++, "]")));
        }
    }

    // Calls visit(key, JsonReader) for every member of an object.
    template <typename Visit>
    void members(Visit visit) const {
        if (!value_.is_object()) {
            wrong("an object");
        }
        for (auto const& [key, element] : value_.items()) {
            visit(key, JsonReader(element, file_, advice_, place_ + "." + key));
        }
    }

    [[noreturn]] void wrong(std::string const& expected) const {
        constexpr size_t most_shown = 60;
        std::string shown =
            spaced(value_.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
        if (shown.size() > most_shown) {
            shown = shown.substr(0, most_shown) + "...";
        }
        fail(SSD_BAD_BUNDLE, file_, ": ", place_.empty() ? "the whole" : place_, " is ", shown,
             ", expected ", expected, "; ", advice_);
    }

private:
    // JSON with a blank behind each comma and colon, as Python writes it.
    static std::string spaced(std::string const& dense) {
        std::string wide;
        bool is_text = false;
        for (size_t i = 0; i < dense.size(); ++i) {
            wide += dense[i];
            if (is_text && dense[i] == '\\') {
                wide += dense[++i];
            } else if (dense[i] == '"') {
                is_text = !is_text;
            } else if (!is_text && (dense[i] == ',' || dense[i] == ':')) {
                wide += ' ';
            }
        }
        return wide;
    }

    JsonReader(nlohmann::ordered_json const& value, std::string const& file,
               std::string const& advice, std::string place)
        : value_(value), file_(file), advice_(advice), place_(std::move(place)) {}

    nlohmann::ordered_json const& value_;
    std::string const& file_;
    std::string const& advice_;
    std::string place_;
};

}  // namespace ssd_runtime
