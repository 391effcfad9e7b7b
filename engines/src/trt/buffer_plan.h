#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "config.h"
#include "trt/engine_manifest.h"

namespace ssd_runtime {

using Sizes = std::map<std::string, int64_t>;        // of the named dimensions
using Aliases = std::map<std::string, std::string>;  // output -> the input whose memory it is

// The prefill's buffer of 0, 1, 2, ... for every row and head, to fill position caches from.
extern char const prompt_positions[];

// A tensor in the plan. offset: from the start of the memory.
struct Buffer {
    uint64_t offset;
    std::vector<int64_t> shape;
    Dtype dtype;

    uint64_t num_bytes() const { return num_elements(shape) * item_bytes(dtype); }
};

// What the plan is made from: a graph at the sizes of a batch.
struct PlannedGraph {
    std::string name;  // of its context
    GraphSpec const* spec;
    Aliases const* aliases;
    Sizes sizes;
    uint64_t scratch_bytes;
};

// (target, source, bytes)
struct Copy {
    uint64_t target, source, num_bytes;
};

// Layout of everything that depends on the batch in one stretch of device memory:
//
//   shared   tokens, step, caches: what the decode step keeps from one run to the next. First what
//            a run leaves for the next one beside its inputs, last where it leaves it, both in one
//            order: a single copy carries all of it over.
//   private  one region for all engines in turn, since they never run at once: scratch memory, the
//            prompt's keys and values, pixels. Nothing in it outlives the next engine that runs.
//
// Every buffer begins at a multiple of 256 bytes.
struct BufferPlan {
    std::map<std::string, Buffer> shared;
    std::map<std::string, std::map<std::string, Buffer>> own;      // by context
    std::map<std::string, std::pair<uint64_t, uint64_t>> scratch;  // offset and bytes
    std::map<std::string, std::vector<Copy>> copies;               // after a run
    uint64_t num_bytes = 0;

    // A buffer that is private to the context, else the shared one of that name; of the prefill's
    // token: the token grid, whose first row it is. Throws Failure SSD_BAD_BUNDLE for neither.
    Buffer const& buffer(std::string const& name, std::string const& context = "") const;
};

// graphs: the decode step first, whose tensors live on between runs.
BufferPlan plan_buffers(std::vector<PlannedGraph> const& graphs);

// What a pass of lookahead has beside the shared buffers of its batch, in another stretch of
// memory. copies: within the batch's, after a run; own_copies: from the pass's into the batch's.
struct PassPlan {
    std::map<std::string, Buffer> own;
    std::pair<uint64_t, uint64_t> scratch;  // offset and bytes
    std::vector<Copy> copies, own_copies;
    uint64_t num_bytes = 0;
};

PassPlan plan_pass(PlannedGraph const& pass, BufferPlan const& batch);

// Output and the input of the next run that it is copied to, where they share no memory; positions
// first.
std::vector<std::pair<std::string, std::string>> carried(GraphSpec const& spec,
                                                         Aliases const& shared);

// The shape of an engine's tensor: with kv-update rows and heads are one dimension of the decode
// step's keys and values.
std::vector<int64_t> engine_shape(GraphSpec const& graph, TensorSpec const& tensor, Form form,
                                  Sizes const& sizes);

// The next multiple of 256.
uint64_t aligned(uint64_t offset);

// Throws Failure SSD_OUT_OF_MEMORY where less is free than is needed, before anything is allocated.
void check_device_memory(std::string const& what, uint64_t needed, uint64_t free);

// The contract of a graph's engine: the graph's, but for a prefill whose engine writes its keys and
// values into the caches, by its aliases; these are then inputs and outputs of it, with rows and
// heads as one dimension.
GraphSpec engine_contract(Config const& config, std::string const& graph, Aliases const& aliases);

}  // namespace ssd_runtime
