#include "config.h"

#include <cmath>
#include <limits>

#include "failure.h"
#include "json_reader.h"

namespace ssd_runtime {
namespace {

constexpr struct {
    Dtype dtype;
    char const* name;
    size_t num_bytes;
} dtypes[] = {{Dtype::float32, "float32", 4},   {Dtype::float16, "float16", 2},
              {Dtype::bfloat16, "bfloat16", 2}, {Dtype::int8, "int8", 1},
              {Dtype::int32, "int32", 4},       {Dtype::int64, "int64", 8}};

Dtype parse_dtype(JsonReader const& json) {
    std::string const name = json.string();
    for (auto const& row : dtypes) {
        if (name == row.name) {
            return row.dtype;
        }
    }
    json.wrong("a dtype such as float32");
}

ModelConfig parse_model(JsonReader const& json) {
    auto const size = [&json](char const* key) { return json[key].integer(1, 1 << 20); };
    return {size("hidden_size"),       size("num_layers"),
            size("num_kv_heads"),      size("head_dim"),
            size("intermediate_size"), size("codebook_size"),
            size("image_size"),        json["vq"]["base_channels"].integer(1, 1 << 20)};
}

TensorSpec parse_tensor(JsonReader const& json) {
    TensorSpec tensor{json["name"].string(), parse_dtype(json["dtype"]), {}};
    json["shape"].each([&tensor](JsonReader const& dimension) {
        if (dimension.is_string()) {
            tensor.shape.push_back({-1, dimension.string()});
        } else {
            tensor.shape.push_back({dimension.integer(1), ""});
        }
    });
    return tensor;
}

GraphSpec parse_graph(JsonReader const& json) {
    GraphSpec graph{json["name"].string(), {}, {}, {}};
    json["inputs"].each([&](JsonReader const& t) { graph.inputs.push_back(parse_tensor(t)); });
    json["outputs"].each([&](JsonReader const& t) { graph.outputs.push_back(parse_tensor(t)); });
    json["aliases"].members([&](std::string const& output, JsonReader const& input) {
        graph.aliases[output] = input.string();
        if (graph.input(input.string()) == nullptr) {
            input.wrong("an input of the graph");
        }
    });
    return graph;
}

HeadGroup parse_group(JsonReader const& json) {
    constexpr int64_t largest = 1 << 24;
    JsonReader const rule = json["rule"];
    int64_t const pinned = rule["pinned_columns"].integer(0, std::numeric_limits<int64_t>::max());
    return {{rule["num_sinks"].integer(-largest, largest),
             rule["num_recent"].integer(-largest, largest), rule["by_score"].boolean(),
             static_cast<uint64_t>(pinned)},
            json["num_slots"].integer(-largest, largest),
            json["evict_every"].integer(-largest, largest),
            json["num_heads"].integer(-largest, largest)};
}

PolicyTable parse_policy(JsonReader const& json, int64_t num_image_tokens, int64_t grid) {
    PolicyTable table{json["name"].string(),
                      json["budget"].number(),
                      json["score_decay"].number(),
                      json["prompt_slots"].integer(-(1 << 24), 1 << 24),
                      false,
                      num_image_tokens,
                      grid,
                      {}};
    if (json.has("kv_dtype")) {
        std::string const kv_dtype = json["kv_dtype"].string();
        if (kv_dtype != "model" && kv_dtype != "int8") {
            json["kv_dtype"].wrong("model or int8");
        }
        table.int8_cache = kv_dtype == "int8";
    }
    json["layers"].each([&table](JsonReader const& layer) {
        auto& groups = table.layers.emplace_back();
        layer.each([&groups](JsonReader const& g) { groups.push_back(parse_group(g)); });
    });
    table.validate();
    return table;
}

TextEmbeddings parse_embeddings(JsonReader const& json) {
    std::vector<int64_t> shape;
    json["shape"].each([&shape](JsonReader const& d) { shape.push_back(d.integer(1)); });
    if (shape.size() != 2) {
        json["shape"].wrong("two numbers");
    }
    int64_t const offset = json["offset"].integer(0, std::numeric_limits<int64_t>::max());
    TextEmbeddings const found{json["file"].string(), static_cast<uint64_t>(offset),
                               parse_dtype(json["dtype"]), shape[0], shape[1]};
    if (found.dtype != Dtype::float32 && found.dtype != Dtype::float16 &&
        found.dtype != Dtype::bfloat16) {
        json["dtype"].wrong("float32, float16 or bfloat16");
    }
    return found;
}

// The number of image tokens is the first dimension of the tokens that a step reads and writes.
int64_t find_num_image_tokens(std::map<std::string, GraphSpec> const& graphs,
                              JsonReader const& json) {
    auto const found = graphs.find("decode_step");
    TensorSpec const* const tokens =
        found == graphs.end() ? nullptr : found->second.input("tokens");
    if (tokens == nullptr || tokens->shape.empty() || tokens->shape[0].number < 4 ||
        tokens->shape[0].number > 1 << 20) {
        json.wrong("a set of graphs with decode_step and its tokens");
    }
    return tokens->shape[0].number;
}

}  // namespace

size_t item_bytes(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].num_bytes; }

char const* dtype_name(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].name; }

std::vector<int64_t> TensorSpec::shape_with(std::map<std::string, int64_t> const& sizes) const {
    std::vector<int64_t> numbers;
    for (Dimension const& dimension : shape) {
        auto const found = sizes.find(dimension.name);
        if (dimension.number < 0 && found == sizes.end()) {
            fail(SSD_BAD_BUNDLE, "tensor ", name, " has the unknown dimension ", dimension.name,
                 "; export the bundle again");
        }
        numbers.push_back(dimension.number < 0 ? found->second : dimension.number);
    }
    return numbers;
}

size_t num_elements(std::vector<int64_t> const& shape) {
    size_t count = 1;
    for (int64_t const dimension : shape) {
        if (dimension < 0 ||
            __builtin_mul_overflow(count, static_cast<size_t>(dimension), &count) ||
            count > size_t{1} << 48U) {
            fail(SSD_BAD_BUNDLE,
                 "a tensor of the bundle has no size that a machine could hold; "
                 "export the bundle again");
        }
    }
    return count;
}

TensorSpec const* GraphSpec::input(std::string const& tensor) const {
    for (TensorSpec const& candidate : inputs) {
        if (candidate.name == tensor) {
            return &candidate;
        }
    }
    return nullptr;
}

Config Config::parse(nlohmann::ordered_json const& parsed, std::string const& path,
                     std::string const& advice) {
    JsonReader const json(parsed, path, advice);
    Config config{};
    config.model = parse_model(json["model"]);
    config.dtype = parse_dtype(json["dtype"]);
    config.weight_format =
        json.has("precision") ? json["precision"]["weights"].string() : std::string("none");
    json["graphs"].members([&config](std::string const& name, JsonReader const& graph) {
        config.graphs.emplace(name, parse_graph(graph));
    });
    config.num_image_tokens = find_num_image_tokens(config.graphs, json["graphs"]);
    config.grid = std::lround(std::sqrt(static_cast<double>(config.num_image_tokens)));
    if (config.grid * config.grid != config.num_image_tokens) {
        json["graphs"].wrong("a set of graphs over a square grid of image tokens");
    }
    config.policy = parse_policy(json["policy"], config.num_image_tokens, config.grid);
    if (static_cast<int64_t>(config.policy.layers.size()) != config.model.num_layers) {
        json["policy"]["layers"].wrong(text(config.model.num_layers, " layers"));
    }
    config.cfg_scale = static_cast<float>(json["generation"]["cfg_scale"].number());
    config.temperature = static_cast<float>(json["generation"]["temperature"].number());
    config.text_embeddings = parse_embeddings(json["text_embeddings"]);
    if (config.text_embeddings.width != config.model.hidden_size) {
        json["text_embeddings"]["shape"].wrong("[vocabulary, hidden_size]");
    }
    return config;
}

GraphSpec const& Config::graph(std::string const& name) const {
    auto const found = graphs.find(name);
    if (found == graphs.end()) {
        fail(SSD_BAD_BUNDLE, "the bundle has no graph ", name,
             "; export it again with --force, or copy it again from where it came");
    }
    return found->second;
}

}  // namespace ssd_runtime
