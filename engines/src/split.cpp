#include "split.h"

#include <mutex>

#include <oniguruma.h>

#include "failure.h"

namespace ssd_runtime {
namespace {

// What the ByteLevel pre-tokenizer of GPT-2 cuts by.
char const gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
char const regex_specials[] = "\\.[]{}()*+?^$|-#&~";

unsigned char const* bytes(char const* text) {
    return reinterpret_cast<unsigned char const*>(text);
}

std::string escaped(std::string const& literal) {
    std::string pattern;
    for (char const byte : literal) {
        if (std::string_view(regex_specials).find(byte) != std::string_view::npos) {
            pattern += '\\';
        }
        pattern += byte;
    }
    return pattern;
}

bool flag(nlohmann::ordered_json const& spec, char const* key, bool if_missing) {
    auto const found = spec.find(key);
    return found == spec.end() || !found->is_boolean() ? if_missing : found->get<bool>();
}

std::string pattern_of(nlohmann::ordered_json const& spec) {
    auto const& pattern = spec.at("pattern");
    return pattern.contains("Regex") ? pattern.at("Regex").get<std::string>()
                                     : escaped(pattern.at("String").get<std::string>());
}

}  // namespace

struct Regex::Compiled {
    regex_t* regex = nullptr;
};

Regex::Regex(std::string const& pattern) : compiled_(std::make_unique<Compiled>()) {
    // Oniguruma sets up its tables on first use and wants that to happen once.
    static std::once_flag once;
    std::call_once(once, [] {
        OnigEncoding encodings[] = {ONIG_ENCODING_UTF8};
        onig_initialize(encodings, 1);
    });
    OnigErrorInfo info;
    auto const* begin = bytes(pattern.data());
    int const result = onig_new(&compiled_->regex, begin, begin + pattern.size(), ONIG_OPTION_NONE,
                                ONIG_ENCODING_UTF8, ONIG_SYNTAX_RUBY, &info);
    if (result != ONIG_NORMAL) {
        unsigned char reason[ONIG_MAX_ERROR_MESSAGE_LEN];
        onig_error_code_to_str(reason, result, &info);
        fail(SSD_BAD_BUNDLE, "tokenizer.json has a regular expression that is none (",
             reinterpret_cast<char const*>(reason), "); take it from the model's repository");
    }
}

Regex::~Regex() {
    if (compiled_->regex != nullptr) {
        onig_free(compiled_->regex);
    }
}

std::vector<Regex::Match> Regex::matches(std::string_view text) const {
    std::vector<Match> found;
    std::unique_ptr<OnigRegion, void (*)(OnigRegion*)> const region(
        onig_region_new(), [](OnigRegion* r) { onig_region_free(r, 1); });
    auto const* begin = bytes(text.data());
    auto const* end = begin + text.size();
    for (size_t start = 0; start <= text.size();) {
        int const position = onig_search(compiled_->regex, begin, end, begin + start, end,
                                         region.get(), ONIG_OPTION_NONE);
        if (position == ONIG_MISMATCH) {
            break;
        }
        if (position < 0) {
            fail(SSD_INVALID_ARGUMENT,
                 "a prompt is too hard for the tokenizer's regular "
                 "expressions; use a shorter one");
        }
        Match const match{static_cast<size_t>(region->beg[0]), static_cast<size_t>(region->end[0])};
        if (match.end > match.begin) {
            found.push_back(match);
            start = match.end;
        } else {  // empty: on to the next character
            start = match.end + 1;
            while (start < text.size() &&
                   (static_cast<unsigned char>(text[start]) & 0xC0U) == 0x80U) {
                ++start;
            }
        }
    }
    return found;
}

Splitter::Splitter(nlohmann::ordered_json const& spec) {
    if (!spec.is_null()) {
        add(spec);
    }
}

void Splitter::add(nlohmann::ordered_json const& spec) {
    std::string const type = spec.at("type").get<std::string>();
    if (type == "Sequence") {
        for (auto const& part : spec.at("pretokenizers")) {
            add(part);
        }
        return;
    }
    Stage stage;
    if (type == "Split") {
        std::string const behavior = spec.at("behavior").get<std::string>();
        if (behavior != "Isolated" && behavior != "Removed") {
            fail(SSD_UNAVAILABLE, "tokenizer.json splits with the behavior ", behavior,
                 ", which ssd_runtime does not have; give token ids (`ssd-export prompts`)");
        }
        stage.regex = std::make_unique<Regex>(pattern_of(spec));
        stage.behavior = behavior == "Removed" ? Behavior::removed : Behavior::isolated;
        stage.invert = flag(spec, "invert", false);
    } else if (type == "Digits") {
        stage.regex =
            std::make_unique<Regex>(flag(spec, "individual_digits", false) ? "\\p{N}" : "\\p{N}+");
    } else if (type == "ByteLevel") {
        stage.add_prefix_space = flag(spec, "add_prefix_space", true);
        if (flag(spec, "use_regex", true)) {
            stage.regex = std::make_unique<Regex>(gpt2_pattern);
        }
    } else {
        fail(SSD_UNAVAILABLE, "tokenizer.json has a pre-tokenizer ", type,
             ", which ssd_runtime does not have; give token ids (`ssd-export prompts`)");
    }
    stages_.push_back(std::move(stage));
}

void Splitter::cut(Stage const& stage, std::string const& piece, std::vector<std::string>& out) {
    std::string const text = stage.add_prefix_space && piece.front() != ' ' ? " " + piece : piece;
    if (!stage.regex) {
        out.push_back(text);
        return;
    }
    auto const keep = [&](size_t begin, size_t end, bool is_match) {
        bool const dropped = stage.behavior == Behavior::removed && is_match != stage.invert;
        if (end > begin && !dropped) {
            out.push_back(text.substr(begin, end - begin));
        }
    };
    size_t end = 0;
    for (Regex::Match const& match : stage.regex->matches(text)) {
        keep(end, match.begin, false);
        keep(match.begin, match.end, true);
        end = match.end;
    }
    keep(end, text.size(), false);
}

std::vector<std::string> Splitter::split(std::string_view text) const {
    std::vector<std::string> pieces{std::string(text)};
    for (Stage const& stage : stages_) {
        std::vector<std::string> next;
        for (std::string const& piece : pieces) {
            cut(stage, piece, next);
        }
        pieces = std::move(next);
    }
    return pieces;
}

}  // namespace ssd_runtime
