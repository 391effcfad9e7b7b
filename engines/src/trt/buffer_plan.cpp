#include "trt/buffer_plan.h"

#include <algorithm>
#include <set>

#include "cache_names.h"
#include "failure.h"
#include "trt/cuda_device.h"

namespace ssd_runtime {

char const prompt_positions[] = "prompt_positions";

namespace {

char const ways_out[] =
    "generate fewer images at once, export with a smaller --budget, --kv-dtype int8 or --weights "
    "int4, close what else uses the GPU, or use the backend onnxruntime";

std::string buffer_name(std::string const& tensor) { return tensor == "token" ? "tokens" : tensor; }

bool is_prefill(GraphSpec const& spec) { return starts_with(spec.name, "prefill"); }

using Placed = std::map<std::string, Buffer>;
// In the order in which they lie.
using Tensors = std::vector<std::pair<TensorSpec, Sizes const*>>;

Placed place(Tensors const& tensors, uint64_t& end) {
    Placed placed;
    for (auto const& [tensor, sizes] : tensors) {
        Buffer const buffer{end, tensor.shape_with(*sizes), tensor.dtype};
        end = aligned(end + buffer.num_bytes());
        placed.emplace(tensor.name, buffer);
    }
    return placed;
}

std::vector<TensorSpec> tensors_of(GraphSpec const& spec) {
    std::vector<TensorSpec> tensors = spec.inputs;
    tensors.insert(tensors.end(), spec.outputs.begin(), spec.outputs.end());
    return tensors;
}

// What a decode step carries over first and where it leaves it last, in one order.
Tensors shared_tensors(PlannedGraph const& decode) {
    std::map<std::string, TensorSpec> named;
    for (TensorSpec const& tensor : tensors_of(*decode.spec)) {
        named.emplace(tensor.name, tensor);
    }
    Tensors first, between, last;
    std::set<std::string> placed;
    for (auto const& [output, input] : carried(*decode.spec, *decode.aliases)) {
        first.emplace_back(named.at(input), &decode.sizes);
        last.emplace_back(named.at(output), &decode.sizes);
        placed.insert({output, input});
    }
    for (auto const& [name, tensor] : named) {
        if (placed.count(name) == 0 && decode.aliases->count(name) == 0) {
            between.emplace_back(tensor, &decode.sizes);
        }
    }
    first.insert(first.end(), between.begin(), between.end());
    first.insert(first.end(), last.begin(), last.end());
    return first;
}

// Heads of the tensor with most of them.
int64_t most_heads(GraphSpec const& decode, Sizes const& sizes) {
    int64_t most = 1;
    for (TensorSpec const& tensor : decode.inputs) {
        if (is_past(tensor.name) && tensor.shape.size() > 1) {
            most = std::max(most, tensor.shape_with(sizes)[1]);
        }
    }
    return most;
}

// What only this graph has, or has in another shape: the prompt's caches.
Tensors own_tensors(PlannedGraph const& graph, PlannedGraph const& decode) {
    std::vector<TensorSpec> const common = tensors_of(*decode.spec);
    Tensors own;
    for (TensorSpec const& tensor : tensors_of(*graph.spec)) {
        bool const is_elsewhere = buffer_name(tensor.name) != tensor.name ||
                                  graph.aliases->count(tensor.name) > 0 ||
                                  std::find(common.begin(), common.end(), tensor) != common.end();
        if (!is_elsewhere) {
            own.emplace_back(tensor, &graph.sizes);
        }
    }
    if (graph.sizes.count("prompt_tokens") > 0) {
        int64_t const heads = most_heads(*decode.spec, decode.sizes);
        own.emplace_back(
            TensorSpec{
                prompt_positions, Dtype::int32, {{-1, "rows"}, {heads, ""}, {-1, "prompt_tokens"}}},
            &graph.sizes);
    }
    return own;
}

// Throws Failure SSD_BAD_BUNDLE for buffers of different sizes.
std::pair<Buffer, Buffer> to_copy(std::string const& graph, std::string const& name,
                                  Buffer const& target, Buffer const& source) {
    if (target.num_bytes() != source.num_bytes()) {
        fail(SSD_BAD_BUNDLE, "the bundle's ", name, " of graph ", graph,
             " has another size than what it is copied to; export the bundle again");
    }
    return {target, source};
}

// Copies of each second buffer to its first, neighbors at once: where one begins at the next
// multiple of 256 bytes behind the other on both sides, what lies between is copied along.
std::vector<Copy> merged(std::vector<std::pair<Buffer, Buffer>> pairs) {
    std::sort(pairs.begin(), pairs.end(), [](auto const& one, auto const& other) {
        return one.first.offset < other.first.offset;
    });
    std::vector<Copy> copies;
    for (auto const& [target, source] : pairs) {
        if (!copies.empty()) {
            Copy& before = copies.back();
            uint64_t const behind = aligned(before.num_bytes);
            if (before.target + behind == target.offset &&
                before.source + behind == source.offset) {
                before.num_bytes = behind + target.num_bytes();
                continue;
            }
        }
        copies.push_back({target.offset, source.offset, target.num_bytes()});
    }
    return copies;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> carried(GraphSpec const& spec,
                                                         Aliases const& shared) {
    std::vector<std::pair<std::string, std::string>> following;
    for (bool const positions : {true, false}) {
        for (TensorSpec const& output : spec.outputs) {
            if (is_present(output.name) && (kind_of(output.name) == "position") == positions) {
                following.emplace_back(output.name, past_of(output.name));
            }
        }
    }
    for (auto const& [output, input] : spec.aliases) {
        if (!is_present(output)) {
            following.emplace_back(output, input);
        }
    }
    following.emplace_back("next_step", "step");
    std::vector<std::pair<std::string, std::string>> copied;
    for (auto const& pair : following) {
        if (spec.output(pair.first) != nullptr && spec.input(pair.second) != nullptr &&
            shared.count(pair.first) == 0) {
            copied.push_back(pair);
        }
    }
    return copied;
}

uint64_t aligned(uint64_t offset) {
    return (offset + device_alignment - 1) / device_alignment * device_alignment;
}

Buffer const& BufferPlan::buffer(std::string const& name, std::string const& context) const {
    auto const region = own.find(context);
    if (region != own.end()) {
        auto const found = region->second.find(name);
        if (found != region->second.end()) {
            return found->second;
        }
    }
    auto const found = shared.find(buffer_name(name));
    if (found == shared.end()) {
        fail(SSD_BAD_BUNDLE, "the engine of ", context, " has no memory for ", name,
             ": engine.json gives it that of a tensor that is not there; build the engines again "
             "with build-engine");
    }
    return found->second;
}

BufferPlan plan_buffers(std::vector<PlannedGraph> const& graphs) {
    PlannedGraph const& decode = graphs.front();
    BufferPlan plan;
    plan.shared = place(shared_tensors(decode), plan.num_bytes);
    uint64_t const region = plan.num_bytes;
    for (PlannedGraph const& graph : graphs) {
        uint64_t end = region;
        plan.own[graph.name] = place(own_tensors(graph, decode), end);
        plan.scratch[graph.name] = {end, graph.scratch_bytes};
        plan.num_bytes = std::max(plan.num_bytes, aligned(end + graph.scratch_bytes));
        std::vector<std::pair<Buffer, Buffer>> pairs;
        for (auto const& [output, input] : carried(*graph.spec, *graph.aliases)) {
            pairs.push_back(
                to_copy(graph.spec->name, output, plan.buffer(input), plan.buffer(output)));
        }
        plan.copies[graph.name] = merged(std::move(pairs));
    }
    return plan;
}

PassPlan plan_pass(PlannedGraph const& pass, BufferPlan const& batch) {
    PassPlan plan;
    Tensors own;
    for (TensorSpec const& tensor : tensors_of(*pass.spec)) {
        auto const shared = batch.shared.find(tensor.name);
        bool const is_shared = shared != batch.shared.end() &&
                               shared->second.shape == tensor.shape_with(pass.sizes) &&
                               shared->second.dtype == tensor.dtype;
        if (!is_shared && is_past(tensor.name)) {
            fail(SSD_BAD_BUNDLE, "graph ", pass.spec->name, " takes ", tensor.name,
                 " in another shape than a decode step; export the bundle again");
        }
        if (!is_shared && pass.aliases->count(tensor.name) == 0) {
            own.emplace_back(tensor, &pass.sizes);
        }
    }
    plan.own = place(own, plan.num_bytes);
    plan.scratch = {plan.num_bytes, pass.scratch_bytes};
    plan.num_bytes = aligned(plan.num_bytes + pass.scratch_bytes);
    std::vector<std::pair<Buffer, Buffer>> shared;
    for (auto const& [output, input] : carried(*pass.spec, *pass.aliases)) {
        auto const found = plan.own.find(output);
        bool const is_own = found != plan.own.end();
        auto const pair = to_copy(pass.spec->name, output, batch.buffer(input),
                                  is_own ? found->second : batch.buffer(output));
        if (is_own) {
            plan.own_copies.push_back(
                {pair.first.offset, pair.second.offset, pair.first.num_bytes()});
        } else {
            shared.push_back(pair);
        }
    }
    plan.copies = merged(std::move(shared));
    return plan;
}

std::vector<int64_t> engine_shape(GraphSpec const& graph, TensorSpec const& tensor, Form form,
                                  Sizes const& sizes) {
    std::vector<int64_t> shape = tensor.shape_with(sizes);
    bool const is_cache = is_past(tensor.name) || is_present(tensor.name);
    std::string const kind = is_cache ? kind_of(tensor.name) : "";
    bool const is_in_place =
        is_prefill(graph) ? !graph.aliases.empty()
                          : form == Form::kv_update && starts_with(graph.name, "decode_step");
    if (is_in_place && shape.size() == 4 && (kind == "key" || kind == "value")) {
        return {shape[0] * shape[1], 1, shape[2], shape[3]};
    }
    return shape;
}

void check_device_memory(std::string const& what, uint64_t needed, uint64_t free) {
    if (needed > free) {
        fail(SSD_OUT_OF_MEMORY, what, " needs ", gib(needed), " of device memory and ", gib(free),
             " are free: ", ways_out);
    }
}

GraphSpec engine_contract(Config const& config, std::string const& graph, Aliases const& aliases) {
    GraphSpec spec = config.graph(graph);
    if (!is_prefill(spec)) {
        return spec;
    }
    GraphSpec const& decode = config.graph("decode_step");
    for (TensorSpec& output : spec.outputs) {
        auto const alias = aliases.find(output.name);
        TensorSpec const* const cache =
            alias == aliases.end() ? nullptr : decode.input(alias->second);
        if (cache != nullptr) {
            spec.inputs.push_back(*cache);
            spec.aliases.insert(*alias);
            output.shape = cache->shape;
        }
    }
    return spec;
}

}  // namespace ssd_runtime
