#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "grid.h"
#include "policy.h"

namespace ssd_runtime {

enum class Dtype { float32, float16, bfloat16, int8, int32, int64 };
constexpr Dtype all_dtypes[] = {Dtype::float32, Dtype::float16, Dtype::bfloat16,
                                Dtype::int8,    Dtype::int32,   Dtype::int64};

size_t item_bytes(Dtype dtype);
char const* dtype_name(Dtype dtype);
std::optional<Dtype> dtype_named(std::string const& name);

// A dimension is a number or a name such as "rows"; number is -1 where it has a name.
struct Dimension {
    int64_t number = -1;
    std::string name;

    bool operator==(Dimension const& other) const {
        return number == other.number && name == other.name;
    }
};

struct TensorSpec {
    std::string name;
    Dtype dtype;
    std::vector<Dimension> shape;

    // Throws Failure SSD_BAD_BUNDLE for a name that `sizes` lacks, or a tensor too large to count.
    std::vector<int64_t> shape_with(std::map<std::string, int64_t> const& sizes) const;

    bool operator==(TensorSpec const& other) const {
        return name == other.name && dtype == other.dtype && shape == other.shape;
    }
};

// Number of elements. Throws Failure where it overflows.
size_t num_elements(std::vector<int64_t> const& shape);

// The graphs that decode images; bundles of --decoder-weights int8 have the second one, too.
constexpr char const image_decoder[] = "image_decoder";
constexpr char const int8_decoder[] = "image_decoder_int8";

// What goes into a graph and what comes out. aliases: output -> the input whose memory it shares.
struct GraphSpec {
    std::string name;
    std::vector<TensorSpec> inputs, outputs;
    std::map<std::string, std::string> aliases;

    // NULL where there is none of that name.
    TensorSpec const* input(std::string const& tensor) const { return named(inputs, tensor); }
    TensorSpec const* output(std::string const& tensor) const { return named(outputs, tensor); }
    bool is_aliased(TensorSpec const& output) const { return aliases.count(output.name) > 0; }

private:
    static TensorSpec const* named(std::vector<TensorSpec> const& tensors, std::string const& name);
};

// rows_per_image: of the batch; 2 with guidance, the conditional and the unconditional row, else 1.
struct ModelConfig {
    int64_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim;
    int64_t intermediate_size, codebook_size, codebook_dim, max_positions;
    int64_t base_channels, pixels_per_token;
    std::string family;
    Grid grid;
    int64_t rows_per_image;
    int64_t caption_dim;  // width of the condition's embeddings where it is another; else 0

    // 0 where prompts are no classes; with guidance the row after the last class is that of none.
    int64_t num_classes() const {
        return family == "llamagen" && caption_dim == 0 ? vocab_size - (rows_per_image - 1) : 0;
    }
    int64_t condition_dim() const { return caption_dim > 0 ? caption_dim : hidden_size; }
    int64_t image_height() const { return grid.height * pixels_per_token; }
    int64_t image_width() const { return grid.width * pixels_per_token; }
};

struct TextEmbeddings {
    std::string file;
    uint64_t offset;
    Dtype dtype;
    int64_t num_rows, width;
};

// ssd_config.json: what a bundle is.
struct Config {
    ModelConfig model;
    Dtype dtype;
    std::string weight_format;  // none, int8, int4, fp8: of the layers, else of the head
    PolicyTable policy;
    float cfg_scale, temperature;
    TextEmbeddings text_embeddings;
    std::map<std::string, GraphSpec> graphs;

    // path, advice: begin and end what Failure SSD_BAD_BUNDLE says of a wrong value.
    static Config parse(nlohmann::ordered_json const& parsed, std::string const& path,
                        std::string const& advice);

    // Throws Failure SSD_BAD_BUNDLE where the bundle lacks it.
    GraphSpec const& graph(std::string const& name) const;
};

}  // namespace ssd_runtime
