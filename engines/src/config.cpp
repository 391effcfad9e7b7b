#include "config.h"

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
    std::optional<Dtype> const dtype = dtype_named(json.string());
    if (!dtype) {
        json.wrong("a dtype such as float32");
    }
    return *dtype;
}

// Far above every published model, so that loops and allocations over them end: the limits of
// ssd_export/bundle/config_checks.py.
constexpr int64_t max_layers = 1024, max_heads = 1024, max_head_dim = 1024, max_width = 1 << 18;
constexpr int64_t max_entries = 1 << 24, max_positions = 1 << 24, max_levels = 10;
constexpr int64_t max_grid_side = 256, max_pixels = 1 << 26;

Grid parse_grid(JsonReader const& json) {
    return {json["height"].integer(1, max_grid_side), json["width"].integer(1, max_grid_side)};
}

ModelConfig parse_model(JsonReader const& json) {
    int64_t levels = 0;
    json["vq"]["channel_multipliers"].each([&levels](JsonReader const& multiplier) {
        multiplier.integer(1, max_width);
        ++levels;
    });
    if (levels < 1 || levels > max_levels) {
        json["vq"]["channel_multipliers"].wrong(text("a list of 1 to ", max_levels));
    }
    ModelConfig const model{
        json["vocab_size"].integer(1, max_entries),
        json["hidden_size"].integer(1, max_width),
        json["num_layers"].integer(1, max_layers),
        json["num_heads"].integer(1, max_heads),
        json["num_kv_heads"].integer(1, max_heads),
        json["head_dim"].integer(1, max_head_dim),
        json["intermediate_size"].integer(1, max_width),
        json["codebook_size"].integer(1, max_entries),
        json["codebook_dim"].integer(1, max_width),
        json["max_positions"].integer(1, max_positions),
        json["vq"]["base_channels"].integer(1, max_width),
        int64_t{1} << (levels - 1),
        json["family"].string(),
        parse_grid(json["grid"]),
        json["rows_per_image"].integer(1, 2),
        json.has("caption_dim") ? json["caption_dim"].integer(0, max_width) : 0};
    if (model.family != "janus" && model.family != "llamagen") {
        fail(
            SSD_BAD_BUNDLE, "the model is of the family '", model.family,
            "', and this ssd_runtime knows janus, llamagen; use the version that wrote the bundle");
    }
    if (json.has("prompt_template")) {
        std::string const name = json["prompt_template"].string();
        if (!name.empty() && name != "janus-pro") {
            fail(SSD_UNAVAILABLE, "the model's prompts are written as '", name,
                 "', and this ssd_runtime knows janus-pro; use ssd-export generate");
        }
    }
    if (model.image_height() * model.image_width() > max_pixels) {
        json["grid"].wrong(text("an image of at most ", max_pixels, " pixels"));
    }
    return model;
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

// every: prompt slots and image tokens, the most slots that a head can fill.
HeadGroup parse_group(JsonReader const& json, int64_t every, Grid const& grid) {
    JsonReader const rule = json["rule"];
    int64_t const columns = grid.width < 62 ? (int64_t{1} << grid.width) - 1 : 0;
    return {{rule["num_sinks"].integer(-1, every), rule["num_recent"].integer(0, every),
             rule["by_score"].boolean(),
             static_cast<uint64_t>(rule["pinned_columns"].integer(0, columns)),
             rule.has("age_quota") && rule["age_quota"].boolean()},
            json["num_slots"].integer(1, every),
            json["evict_every"].integer(1, grid.num_tokens()),
            json["num_heads"].integer(1, max_heads)};
}

PolicyTable parse_policy(JsonReader const& json, ModelConfig const& model) {
    Grid const grid = parse_grid(json["grid"]);
    if (grid.height != model.grid.height || grid.width != model.grid.width) {
        json["grid"].wrong(text("the model's ", model.grid.height, " x ", model.grid.width));
    }
    int64_t const most_slots = model.max_positions - grid.num_tokens();
    PolicyTable table{json["name"].string(),
                      json["budget"].number(),
                      json["score_decay"].number(),
                      json["prompt_slots"].integer(1, most_slots),
                      false,
                      grid,
                      {}};
    if (json.has("kv_dtype")) {
        std::string const kv_dtype = json["kv_dtype"].string();
        if (kv_dtype != "model" && kv_dtype != "int8") {
            json["kv_dtype"].wrong("model or int8");
        }
        table.int8_cache = kv_dtype == "int8";
    }
    int64_t const every = table.prompt_slots + grid.num_tokens();
    json["layers"].each([&](JsonReader const& layer) {
        auto& groups = table.layers.emplace_back();
        int64_t heads = 0;
        layer.each([&](JsonReader const& group) {
            groups.push_back(parse_group(group, every, grid));
            heads += groups.back().num_heads;
        });
        if (heads != model.num_kv_heads) {
            layer.wrong(text("groups of ", model.num_kv_heads, " heads in all"));
        }
    });
    if (static_cast<int64_t>(table.layers.size()) != model.num_layers) {
        json["layers"].wrong(text("the model's ", model.num_layers, " layers"));
    }
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

std::string parse_weight_format(JsonReader const& json) {
    if (!json.has("precision")) {
        return "none";
    }
    JsonReader const precision = json["precision"];
    std::string layers = precision["weights"].string();
    return layers == "none" && precision.has("head") ? precision["head"].string() : layers;
}

}  // namespace

size_t item_bytes(Dtype dtype) { return dtypes[static_cast<size_t>(dtype)].num_bytes; }

std::optional<Dtype> dtype_named(std::string const& name) {
    for (auto const& row : dtypes) {
        if (name == row.name) {
            return row.dtype;
        }
    }
    return std::nullopt;
}

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

TensorSpec const* GraphSpec::named(std::vector<TensorSpec> const& tensors,
                                   std::string const& name) {
    for (TensorSpec const& tensor : tensors) {
        if (tensor.name == name) {
            return &tensor;
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
    config.weight_format = parse_weight_format(json);
    json["graphs"].members([&config](std::string const& name, JsonReader const& graph) {
        config.graphs.emplace(name, parse_graph(graph));
    });
    config.policy = parse_policy(json["policy"], config.model);
    try {
        config.policy.validate();
    } catch (Failure const& failure) {
        fail(SSD_BAD_BUNDLE, path, ": ", failure.what(), "; ", advice);
    }
    config.cfg_scale = static_cast<float>(json["generation"]["cfg_scale"].number());
    config.temperature = static_cast<float>(json["generation"]["temperature"].number());
    config.text_embeddings = parse_embeddings(json["text_embeddings"]);
    ModelConfig const& model = config.model;
    if (config.text_embeddings.num_rows != model.vocab_size ||
        config.text_embeddings.width != model.condition_dim()) {
        json["text_embeddings"]["shape"].wrong(text(
            "vocab_size x condition_dim, [", model.vocab_size, ", ", model.condition_dim(), "]"));
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
