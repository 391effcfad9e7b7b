#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace ssd_runtime {

// A compiled regular expression of Oniguruma over UTF-8.
class Regex {
public:
    // Throws Failure SSD_BAD_BUNDLE where the pattern is none.
    explicit Regex(std::string const& pattern);
    Regex(Regex const&) = delete;
    Regex& operator=(Regex const&) = delete;
    ~Regex();

    struct Match {
        size_t begin, end;
    };
    // Matches that are not empty, from left to right.
    std::vector<Match> matches(std::string_view text) const;

private:
    struct Compiled;
    std::unique_ptr<Compiled> compiled_;
};

// The pre-tokenizer of a tokenizer.json: cuts text into the pieces within which tokens merge.
class Splitter {
public:
    // Throws Failure SSD_UNAVAILABLE for a kind of pre-tokenizer that is not implemented.
    explicit Splitter(nlohmann::ordered_json const& spec);

    std::vector<std::string> split(std::string_view text) const;

private:
    enum class Behavior { isolated, removed };
    struct Stage {
        std::unique_ptr<Regex> regex;  // none: only the prefix space
        Behavior behavior = Behavior::isolated;
        bool invert = false;
        bool add_prefix_space = false;
    };

    void add(nlohmann::ordered_json const& spec);
    static void cut(Stage const& stage, std::string const& piece, std::vector<std::string>& out);

    std::vector<Stage> stages_;
};

}  // namespace ssd_runtime
