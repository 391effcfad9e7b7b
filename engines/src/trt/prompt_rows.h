#pragma once

#include <cstdint>
#include <vector>

#include "runner.h"

namespace ssd_runtime {

// Which rows of a batch its prefill computes, and how all rows come to their prompts' caches.
//
// A batch has two rows an image, and the unconditional rows of prompts of one length are the same.
// Each different prompt is computed once, by a smaller run of the same engine, and copied on the
// device: from what the engine returned, or among the rows of a cache that it wrote into by itself.
// The same as ssd_export/tensorrt/prompt_rows.py.

// Numbers of images at which the prefill of a batch may run: few, because TensorRT-RTX compiles
// kernels for each. 1 serves images of one prompt, the half prompts of one length, which share
// their unconditional row.
std::vector<int64_t> prompt_sizes(int64_t num_images);

// computed: the rows of the batch that the prefill computes; place: for every row of the batch the
// place of its prompt among those.
struct PromptRows {
    std::vector<size_t> computed, place;
};

// sizes: numbers of images, ascending, the batch's the last. As many rows as the least that holds
// every different prompt has; places left over repeat the last one.
PromptRows rows_to_compute(PromptBatch const& batch, std::vector<int64_t> const& sizes);

// Token 0 of every image, of logits [rows, codebook] and noise [images, codebook]: as the sampler
// of a graph draws it. top_k: 0 where every code is kept.
std::vector<int32_t> draw_tokens(std::vector<float> const& logits, std::vector<float> const& noise,
                                 size_t codebook_size, Sampling const& sampling);

// Copies the first `length` slots of `count` rows: of the prompts as the prefill returned them, or
// of the cache itself.
struct RowCopy {
    size_t target, source, count;
    size_t length;
    bool is_of_prompts;
};

// How prompts that were computed apart from a cache come to all of its rows, with lengths of their
// own. place, lengths: of each row.
std::vector<RowCopy> copies_from_prompts(std::vector<size_t> const& place,
                                         std::vector<int32_t> const& lengths);

// How prompts that were computed in the first rows of a cache come to all of them, with the padding
// (num_tokens) in their lengths, since a row may hold a longer prompt before. No copy reads what it
// writes, nor what one before it has overwritten.
std::vector<RowCopy> copies_in_place(std::vector<size_t> const& place, size_t num_tokens);

}  // namespace ssd_runtime
