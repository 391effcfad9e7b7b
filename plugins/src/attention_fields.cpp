#include "ssd_export/attention_fields.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace ssd_export {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using Fields = AttentionFields;

constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
constexpr int32_t kMaskBits = 32;  // bit 31 of pinned_columns is its sign
// What every GPU grants without being asked for more.
constexpr int32_t kMostSharedBytes = 48 * 1024;
constexpr PluginFieldType kImage = PluginFieldType::kINT8;  // ONNX strings are UTF-8

struct ListField {
    char const* name;
    OfGroups Fields::* member;
    int32_t least;
    int32_t most;
};

constexpr ListField kLists[] = {
    {"num_sinks", &Fields::num_sinks, -1, kMost},
    {"num_recent", &Fields::num_recent, 0, kMost},
    {"by_score", &Fields::by_score, 0, 1},
    {"pinned_columns", &Fields::pinned_columns, kLeast, kMost},
    {"age_quota", &Fields::age_quota, 0, 1},
    {"evict_every", &Fields::evict_every, 1, kMost},
};

struct IntegerField {
    char const* name;
    int32_t Fields::* member;
    int32_t least;
    int32_t most;
};

constexpr IntegerField kIntegers[] = {
    {"grid_width", &Fields::grid_width, 1, kMost},
    {"kernel_head_dim", &Fields::kernel_head_dim, 1, 256},
    {"kernel_max_slots", &Fields::kernel_max_slots, 1, kMost},
    {"kernel_block_slots", &Fields::kernel_block_slots, 1, kMost},
    {"kernel_max_splits", &Fields::kernel_max_splits, 1, 1024},
    {"kernel_num_warps", &Fields::kernel_num_warps, 1, 32},
};

struct RealField {
    char const* name;
    float Fields::* member;
    float least;
    float most;
};

constexpr RealField kReals[] = {
    {"score_decay", &Fields::score_decay, 0.0F, 1.0F},
};

struct TextField {
    char const* name;
    std::string Fields::* member;
};

constexpr TextField kTexts[] = {
    {"kernel_dtype", &Fields::kernel_dtype},
};

[[noreturn]] void reject(std::string const& message) { throw std::invalid_argument(message); }

// The field of that name.
PluginField const& find(nvinfer1::PluginFieldCollection const& collection,
                        std::string const& name) {
    for (int32_t i = 0; i < collection.nbFields; ++i) {
        PluginField const& field = collection.fields[i];
        if (field.name != nullptr && field.name == name && field.data != nullptr) {
            return field;
        }
    }
    bool const is_kernel = name.rfind("kernel_", 0) == 0;
    reject(
        "field " + name + " is missing; " +
        (is_kernel
             ? "attach a compiled kernel to the ONNX nodes (ssd_export.kernels.image.attach_kernel)"
             : "export the bundle again with this version of ssd-export"));
}

int64_t integer_at(PluginField const& field, int32_t place) {
    return field.type == PluginFieldType::kINT32 ? static_cast<int32_t const*>(field.data)[place]
                                                 : static_cast<int64_t const*>(field.data)[place];
}

bool holds_integers(PluginField const& field) {
    return field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
}

template <typename Field>
int32_t checked(Field const& wanted, int64_t value) {
    if (value < wanted.least || value > wanted.most) {
        reject(std::string(wanted.name) + "=" + std::to_string(value) + " is outside " +
               std::to_string(wanted.least) + ".." + std::to_string(wanted.most) +
               "; export the bundle again");
    }
    return static_cast<int32_t>(value);
}

int32_t read_integer(PluginField const& field, IntegerField const& wanted) {
    if (field.length != 1 || !holds_integers(field)) {
        reject(std::string("field ") + field.name + " must be one integer");
    }
    return checked(wanted, integer_at(field, 0));
}

// A number for each head group; num_groups: 0 before the first list is read.
OfGroups read_list(PluginField const& field, ListField const& wanted, int32_t& num_groups) {
    if (field.length < 1 || field.length > kMaxGroups || !holds_integers(field)) {
        reject(std::string("field ") + field.name + " must be 1 to " + std::to_string(kMaxGroups) +
               " integers, one for each head group");
    }
    if (num_groups != 0 && field.length != num_groups) {
        reject(std::string("field ") + field.name + " has " + std::to_string(field.length) +
               " numbers for " + std::to_string(num_groups) +
               " head groups; export the bundle again");
    }
    num_groups = field.length;
    OfGroups values;
    values.fill(1);  // as ssd_export/kernels/layer_groups.py fills them
    for (int32_t group = 0; group < field.length; ++group) {
        values[group] = checked(wanted, integer_at(field, group));
    }
    return values;
}

float read_real(PluginField const& field, RealField const& wanted) {
    if (field.length != 1 || field.type != PluginFieldType::kFLOAT32) {
        reject(std::string("field ") + field.name + " must be one float");
    }
    float const value = *static_cast<float const*>(field.data);
    if (!(value >= wanted.least && value <= wanted.most)) {  // NaN is outside, too
        reject(std::string(wanted.name) + "=" + std::to_string(value) + " is outside " +
               std::to_string(wanted.least) + ".." + std::to_string(wanted.most) +
               "; export the bundle again");
    }
    return value;
}

// ONNX strings arrive with a terminating zero counted in their length; serialized ones have none.
std::string read_text(PluginField const& field, PluginFieldType type) {
    if (field.type != type || field.length < 1) {
        reject(std::string("field ") + field.name + " must be " +
               (type == kImage ? "an int8 tensor" : "a string") + " that is not empty");
    }
    std::string text(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
    if (type == PluginFieldType::kCHAR && text.back() == '\0') {
        text.pop_back();
    }
    return text;
}

// Returns if every pinned column is one of the grid's.
void check_columns(AttentionFields const& fields) {
    for (int32_t group = 0; group < fields.num_groups; ++group) {
        auto const mask = static_cast<uint32_t>(fields.pinned_columns[group]);
        if (fields.grid_width < kMaskBits && (mask >> fields.grid_width) != 0) {
            reject("pinned_columns=" + std::to_string(mask) +
                   " pins columns that a grid of width " + std::to_string(fields.grid_width) +
                   " does not have; export the bundle again");
        }
    }
}

// Returns if the image begins as a cubin (ELF), a fatbin or PTX text does.
void check_image(std::string const& image, char const* name) {
    static constexpr unsigned char kFatbin[] = {0x50, 0xed, 0x55, 0xba};
    bool const is_elf = image.compare(0, 4, "\177ELF") == 0;
    bool const is_fatbin = image.size() > 4 && std::memcmp(image.data(), kFatbin, 4) == 0;
    bool const is_ptx =
        image.find(".version") != std::string::npos && image.find(".entry") != std::string::npos;
    if (!is_elf && !is_fatbin && !is_ptx) {
        reject(std::string(name) +
               " is neither a cubin nor a fatbin nor PTX; compile the kernels again");
    }
}

KernelFields read_kernel(nvinfer1::PluginFieldCollection const& collection,
                         KernelNames const& names) {
    KernelFields kernel;
    kernel.image = read_text(find(collection, names.image), kImage);
    check_image(kernel.image, names.image);
    kernel.name = read_text(find(collection, names.name), PluginFieldType::kCHAR);
    IntegerField const shared{names.shared_bytes, nullptr, 0, kMostSharedBytes};
    kernel.shared_bytes = read_integer(find(collection, names.shared_bytes), shared);
    return kernel;
}

PluginField text_field(char const* name, std::string const& text, PluginFieldType type) {
    return PluginField(name, text.data(), type, static_cast<int32_t>(text.size()));
}

}  // namespace

nvinfer1::DataType AttentionFields::data_type() const {
    if (kernel_dtype == "float16") {
        return nvinfer1::DataType::kHALF;
    }
    if (kernel_dtype == "bfloat16") {
        return nvinfer1::DataType::kBF16;
    }
    if (kernel_dtype == "float32") {
        return nvinfer1::DataType::kFLOAT;
    }
    reject("kernel_dtype=" + kernel_dtype + " is unknown; use float16, bfloat16 or float32");
}

int32_t AttentionFields::element_bytes() const { return kernel_dtype == "float32" ? 4 : 2; }

bool AttentionFields::has_scores() const {
    return std::any_of(by_score.begin(), by_score.begin() + num_groups,
                       [](int32_t one) { return one != 0; });
}

std::vector<PluginField> field_names(NodeKind const& kind) {
    std::vector<PluginField> names;
    for (auto const& field : kLists) {
        names.emplace_back(field.name, nullptr, PluginFieldType::kINT32, kMaxGroups);
    }
    for (auto const& field : kIntegers) {
        names.emplace_back(field.name, nullptr, PluginFieldType::kINT32, 1);
    }
    for (auto const& field : kReals) {
        names.emplace_back(field.name, nullptr, PluginFieldType::kFLOAT32, 1);
    }
    for (auto const& field : kTexts) {
        names.emplace_back(field.name, nullptr, PluginFieldType::kCHAR, 1);
    }
    for (auto const& kernel : kind.kernels) {
        names.emplace_back(kernel.image, nullptr, kImage, 1);
        names.emplace_back(kernel.name, nullptr, PluginFieldType::kCHAR, 1);
        names.emplace_back(kernel.shared_bytes, nullptr, PluginFieldType::kINT32, 1);
    }
    return names;
}

std::vector<PluginField> fields_to_serialize(NodeKind const& kind, AttentionFields const& fields) {
    std::vector<PluginField> filled;
    for (auto const& field : kLists) {
        filled.emplace_back(field.name, (fields.*field.member).data(), PluginFieldType::kINT32,
                            fields.num_groups);
    }
    for (auto const& field : kIntegers) {
        filled.emplace_back(field.name, &(fields.*field.member), PluginFieldType::kINT32, 1);
    }
    for (auto const& field : kReals) {
        filled.emplace_back(field.name, &(fields.*field.member), PluginFieldType::kFLOAT32, 1);
    }
    for (auto const& field : kTexts) {
        filled.push_back(text_field(field.name, fields.*field.member, PluginFieldType::kCHAR));
    }
    for (int32_t place = 0; place < kind.kernels.size; ++place) {
        KernelNames const& names = kind.kernels[place];
        KernelFields const& kernel = fields.kernels[place];
        filled.push_back(text_field(names.image, kernel.image, kImage));
        filled.push_back(text_field(names.name, kernel.name, PluginFieldType::kCHAR));
        filled.emplace_back(names.shared_bytes, &kernel.shared_bytes, PluginFieldType::kINT32, 1);
    }
    return filled;
}

AttentionFields read_fields(NodeKind const& kind,
                            nvinfer1::PluginFieldCollection const& collection) {
    AttentionFields fields;
    for (auto const& wanted : kLists) {
        fields.*wanted.member = read_list(find(collection, wanted.name), wanted, fields.num_groups);
    }
    for (auto const& wanted : kIntegers) {
        fields.*wanted.member = read_integer(find(collection, wanted.name), wanted);
    }
    for (auto const& wanted : kReals) {
        fields.*wanted.member = read_real(find(collection, wanted.name), wanted);
    }
    for (auto const& wanted : kTexts) {
        fields.*wanted.member = read_text(find(collection, wanted.name), PluginFieldType::kCHAR);
    }
    for (auto const& names : kind.kernels) {
        fields.kernels.push_back(read_kernel(collection, names));
    }
    check_columns(fields);
    fields.data_type();  // throws for an unknown one
    return fields;
}

}  // namespace ssd_export
