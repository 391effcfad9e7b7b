// Mutated files for everything that reads a bundle: what is wrong must be a Failure of a few kinds,
// never another exception, undefined behavior, or a loop without an end.
//
//     ssd_fuzz CORPUS SEED FIRST COUNT
//
// mutates the files of a folder whose names begin with a reader's, COUNT times. Run N depends on
// the seed and N alone, and CORPUS/run holds the number of the one under way, so that one that
// ended the process can be repeated. Built by clang with
// SSD_RUNTIME_SANITIZE=fuzzer-no-link,address,undefined it is libFuzzer's program instead
// (`ssd_fuzz DIR`), whose inputs begin with the reader's number.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/time.h>
#include <unistd.h>

#include "auto_window.h"
#include "bundle.h"
#include "conditions.h"
#include "config.h"
#include "failure.h"
#include "files.h"
#include "json_reader.h"
#include "template_encoder.h"
#include "trt/engine_manifest.h"

namespace {

using namespace ssd_runtime;

constexpr char folder_variable[] = "SSD_FUZZ_FOLDER";  // that a manifest is read in

std::string& intact_tokenizer() {
    static std::string content;
    return content;
}

// What a model is asked with the numbers of its config.
void use(Config const& config) {
    PolicyTable const& table = config.policy;
    size_t const item = item_bytes(config.dtype);
    int64_t const rows = config.model.rows_per_image;
    table.cache_bytes(config.model.head_dim, item, rows);
    table.image_cache_bytes(config.model.head_dim, item, rows);
    table.full_cache_bytes(config.model.head_dim, item, rows, config.model.grid.num_tokens());
    table.tokens_evicted(table.prompt_slots);
    if (config.model.grid.num_tokens() <= 4096 &&
        table.layers.size() <= 64) {  // else it takes long
        table.rooms({1, static_cast<int32_t>(table.prompt_slots)});
    }
    step_operations(config);
    std::map<std::string, int64_t> const sizes = {
        {"images", 2}, {"rows", 4}, {"prompt_tokens", 8}, {"window", 8}};
    for (auto const& [name, graph] : config.graphs) {
        for (auto const* side : {&graph.inputs, &graph.outputs}) {
            for (TensorSpec const& tensor : *side) {
                num_elements(tensor.shape_with(sizes));
            }
        }
    }
}

void read_config(std::string const& content) {
    try {
        use(Config::parse(parse_json(content), "config", "again"));
    } catch (NotJson const& error) {
        fail(SSD_BAD_BUNDLE, error.what());
    }
}

void read_tokenizer(std::string const& content) {
    TemplateEncoder const encoder(content, "tokenizer.json", 64, 1 << 17);
    if (encoder.why_no_text().empty()) {
        for (char const* const text :
             {"a red circle above a blue square", "don't  stop 1234", "¿été? 日本"}) {
            encoder.check(encoder.encode(text, "prompt"), "prompt");
        }
    }
}

void read_prompt(std::string const& content) {
    static TemplateEncoder const encoder(intact_tokenizer(), "tokenizer.json", 1 << 20, 1 << 17);
    encoder.check(encoder.encode(checked_text(content, "prompt"), "prompt"), "prompt");
}

void read_classes(std::string const& content) {
    ClassEncoder const encoder(content, "config.json", 4);
    encoder.encode("2", "prompt");
}

// The manifest of a folder that has what it names.
void read_manifest(std::string const& content) {
    std::string const folder = std::getenv(folder_variable);
    std::ofstream(folder + "/manifest.json", std::ios::binary) << content;
    Bundle const bundle(folder);
    for (std::string const& name : bundle.names()) {
        bundle.file(name);
    }
}

void read_engines(std::string const& content) {
    EngineManifest const manifest = parse_engine_json(content, "engine.json", "build it again");
    for (auto const& [name, entry] : manifest.graphs) {
        entry.profiles.front().images.hold(1);
    }
}

void read_weights(std::string const& content) { weight_bytes(content, "weights", "bundle"); }

struct Reader {
    char const* name;
    void (*read)(std::string const& content);
};
constexpr Reader readers[] = {
    {"config", read_config},   {"tokenizer", read_tokenizer}, {"prompt", read_prompt},
    {"classes", read_classes}, {"manifest", read_manifest},   {"engines", read_engines},
    {"weights", read_weights},
};

bool is_expected(ssd_status status) {
    return status == SSD_BAD_BUNDLE || status == SSD_UNAVAILABLE || status == SSD_INVALID_ARGUMENT;
}

// Whether the reader took it.
bool takes(Reader const& reader, std::string const& content) {
    try {
        reader.read(content);
        return true;
    } catch (Failure const& failure) {
        if (!is_expected(failure.status()) || std::string(failure.what()).empty()) {
            std::fprintf(stderr, "%s: status %d: %s\n", reader.name, failure.status(),
                         failure.what());
            std::abort();
        }
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s: another exception: %s\n", reader.name, error.what());
        std::abort();
    }
    return false;
}

#ifndef SSD_LIBFUZZER

struct Seed {
    Reader const* reader;
    std::string content;
};

std::vector<Seed> seeds_of(std::string const& folder) {
    std::vector<std::string> names;
    DIR* const listing = opendir(folder.c_str());
    while (dirent const* const entry = listing == nullptr ? nullptr : readdir(listing)) {
        names.emplace_back(entry->d_name);
    }
    if (listing != nullptr) {
        closedir(listing);
    }
    std::sort(names.begin(), names.end());
    std::vector<Seed> seeds;
    for (std::string const& name : names) {
        for (Reader const& reader : readers) {
            std::string content;
            if (name.rfind(std::string(reader.name) + ".", 0) == 0 &&
                read_file(folder + "/" + name, size_t{64} << 20U, content)) {
                seeds.push_back({&reader, content});
            }
        }
    }
    return seeds;
}

char const* const words[] = {"-1",
                             "0",
                             "1",
                             "2",
                             "255",
                             "65536",
                             "2147483647",
                             "2147483648",
                             "4294967296",
                             "9223372036854775807",
                             "9223372036854775808",
                             "18446744073709551615",
                             "1e308",
                             "-1e308",
                             "1e999",
                             "0.5",
                             "null",
                             "true",
                             "false",
                             "\"\"",
                             "[]",
                             "{}",
                             "[[",
                             "}",
                             "]",
                             ",",
                             ":",
                             "\"",
                             "\\",
                             "\\u0000",
                             "\\ud800",
                             "\xff",
                             "\xc3",
                             "\xe2\x80",
                             " ",
                             "..",
                             "/",
                             "[1,2,3]",
                             "{\"a\":{}}",
                             "(a*)*b",
                             "(?=",
                             "|"};

// One to eight changes: a number or a piece of text for another, bytes, parts moved and doubled.
class Mutation {
public:
    Mutation(uint64_t seed, uint64_t run) : chance_(seed * 1'000'003 + run) {}

    size_t below(size_t count) { return count == 0 ? 0 : chance_() % count; }

    std::string of(std::string content, std::vector<Seed> const& seeds) {
        size_t const changes = size_t{1} << below(4);
        for (size_t change = 0; change < changes; ++change) {
            content = once(std::move(content), seeds);
        }
        return content;
    }

private:
    std::string once(std::string content, std::vector<Seed> const& seeds) {
        size_t const at = below(content.size() + 1);
        size_t const length =
            below(std::min<size_t>(content.size() - at, size_t{1} << below(10)) + 1);
        switch (below(9)) {
        case 0: return number(std::move(content), at);
        case 1: return number(std::move(content), at);
        case 2: return content.replace(at, length, words[below(std::size(words))]);
        case 3: return content.insert(at, words[below(std::size(words))]);
        case 4: return content.erase(at, length);
        case 5: return content.insert(below(content.size() + 1), content.substr(at, length));
        case 6: {
            std::string const& other = seeds[below(seeds.size())].content;
            size_t const from = below(other.size() + 1);
            return content.replace(at, length, other.substr(from, below(200)));
        }
        case 7: return content.insert(at, std::string(below(20'000), "[{\"("[below(4)]));
        default:
            if (at < content.size()) {
                content[at] = static_cast<char>(below(256));
            }
            return content;
        }
    }

    // Another number, word or nest of lists in place of the value after the next colon, blank or
    // comma.
    std::string number(std::string content, size_t at) {
        size_t const begin = content.find_first_of("0123456789tfn", at);
        if (begin == std::string::npos) {
            return content;
        }
        size_t const end = std::min(content.find_first_of(",]} \n", begin), content.size());
        if (below(8) == 0) {
            size_t const depth = below(100'000);
            return content.replace(begin, end - begin,
                                   std::string(depth, '[') + std::string(depth, ']'));
        }
        return content.replace(begin, end - begin, words[below(std::size(words))]);
    }

    std::mt19937_64 chance_;
};

// A run that takes longer than this many seconds of the processor ends the process.
void allow(int seconds) {
    itimerval const limit{{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &limit, nullptr);
}

class Fuzzer {
public:
    Fuzzer(std::string const& corpus, uint64_t seed)
        : corpus_(corpus), seeds_(seeds_of(corpus)), seed_(seed) {
        for (Seed const& one : seeds_) {
            if (one.reader->read == read_tokenizer && intact_tokenizer().empty()) {
                intact_tokenizer() = one.content;
            }
        }
        if (seeds_.empty() || intact_tokenizer().empty()) {
            std::fprintf(stderr, "%s holds no files to begin with\n", corpus.c_str());
            std::exit(2);
        }
        under_way_ = open((corpus + "/run").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    }

    // The files as they are, which their readers must take.
    void begin() const {
        for (Seed const& one : seeds_) {
            if (!takes(*one.reader, one.content)) {
                std::fprintf(stderr, "%s: refused before any change\n", one.reader->name);
                std::exit(3);
            }
        }
    }

    void run(uint64_t number) {
        std::string const name = std::to_string(number);
        if (pwrite(under_way_, name.data(), name.size(), 0) < 0) {
            std::exit(2);
        }
        Mutation mutation(seed_, number);
        size_t const place = mutation.below(seeds_.size());
        std::string const content = mutation.of(seeds_[place].content, seeds_);
        allow(10);
        ++(takes(*seeds_[place].reader, content) ? taken_ : refused_);
        allow(0);
    }

    void report() const {
        std::printf("%llu taken, %llu refused\n", static_cast<unsigned long long>(taken_),
                    static_cast<unsigned long long>(refused_));
    }

private:
    std::string corpus_;
    std::vector<Seed> seeds_;
    uint64_t seed_, taken_ = 0, refused_ = 0;
    int under_way_ = -1;
};

#endif

}  // namespace

#ifdef SSD_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size) {
    if (size == 0) {
        return 0;
    }
    Reader const& reader = readers[data[0] % std::size(readers)];
    bool const needs_files = reader.read == read_manifest || reader.read == read_prompt;
    if (!needs_files) {
        takes(reader, std::string(reinterpret_cast<char const*>(data + 1), size - 1));
    }
    return 0;
}

#else

int main(int argc, char** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: ssd_fuzz CORPUS SEED FIRST COUNT\n");
        return 2;
    }
    setenv(folder_variable, (std::string(argv[1]) + "/bundle").c_str(), 1);
    auto const number = [argv](int place) { return std::strtoull(argv[place], nullptr, 10); };
    Fuzzer fuzzer(argv[1], number(2));
    fuzzer.begin();
    for (uint64_t run = number(3); run < number(3) + number(4); ++run) {
        fuzzer.run(run);
    }
    fuzzer.report();
}

#endif
