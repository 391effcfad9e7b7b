"""llama.cpp through llama-cpp-python: a GGUF file of the common shape, and its decode steps.

python -m benchmarks.peers.llama_cpp_peer build FOLDER NUM_LAYERS FORMAT
python -m benchmarks.peers.llama_cpp_peer MODEL.gguf NUM_IMAGES NUM_THREADS
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.peers import shape
from benchmarks.peers.protocol import serve

FORMATS = {"q4_0": 2, "q8_0": 7}  # GGUF's file types
ROOM = 512  # steps that the caches have room for


def build(folder: Path, num_layers: int, format: str) -> None:
    """Writes FORMAT.gguf. The head of q4_0 is Q8_0, as llama.cpp's own converter leaves it."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind, head = kinds[format.upper()], kinds.Q8_0
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / f"{format}.gguf", "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.HIDDEN_SIZE)
    writer.add_feed_forward_length(shape.INTERMEDIATE_SIZE)
    writer.add_head_count(shape.NUM_HEADS)
    writer.add_head_count_kv(shape.NUM_HEADS)
    writer.add_layer_norm_rms_eps(shape.RMS_NORM_EPS)
    writer.add_rope_dimension_count(shape.HEAD_DIM)
    writer.add_rope_freq_base(shape.ROPE_THETA)
    writer.add_vocab_size(shape.CODEBOOK_SIZE)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FORMATS[format])
    numbers = count()

    def matrix(
        name: str, num_outputs: int, num_inputs: int, kind: gguf.GGMLQuantizationType
    ) -> None:
        values = shape.random_matrix(num_outputs, num_inputs, next(numbers))
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.HIDDEN_SIZE, np.float32))

    hidden, inner = shape.HIDDEN_SIZE, shape.INTERMEDIATE_SIZE
    matrix("token_embd.weight", shape.CODEBOOK_SIZE, hidden, kinds.F16)
    matrix("output.weight", shape.CODEBOOK_SIZE, hidden, head)
    ones("output_norm.weight")
    for layer in range(num_layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{part}.weight", hidden, hidden, kind)
        matrix(f"blk.{layer}.ffn_gate.weight", inner, hidden, kind)
        matrix(f"blk.{layer}.ffn_up.weight", inner, hidden, kind)
        matrix(f"blk.{layer}.ffn_down.weight", hidden, inner, kind)
        ones(f"blk.{layer}.attn_norm.weight")
        ones(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_model(path: str, num_images: int, num_threads: int) -> Callable[[], object]:
    """A decode step of two rows an image, each a sequence with the common context."""
    import llama_cpp

    rows = 2 * num_images
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp could not read {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = rows * (shape.CONTEXT + ROOM)
    options.n_seq_max, options.kv_unified = rows, False
    options.n_threads = options.n_threads_batch = num_threads
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"llama.cpp could not open a context of {rows} sequences")

    def decode(batch: llama_cpp.llama_batch) -> None:
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(context)

    prompt = llama_cpp.llama_batch_init(shape.CONTEXT, 0, 1)
    prompt.n_tokens = shape.CONTEXT
    for place in range(shape.CONTEXT):
        prompt.token[place] = place * 7919 % shape.CODEBOOK_SIZE
        _put(prompt, place, 0, place, place == shape.CONTEXT - 1)
    decode(prompt)
    memory = llama_cpp.llama_get_memory(context)
    for row in range(1, rows):
        llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)
    places = count(shape.CONTEXT)
    embeds = shape.random_rows(rows, shape.HIDDEN_SIZE).copy()
    step = llama_cpp.llama_batch_init(rows, shape.HIDDEN_SIZE, 1)
    step.n_tokens = rows
    ctypes.memmove(step.embd, embeds.ctypes.data, embeds.nbytes)

    def take() -> None:
        place = next(places)
        for row in range(rows):
            _put(step, row, row, place, True)
        decode(step)

    return take


def _put(batch: ctypes.Structure, index: int, sequence: int, place: int, logits: bool) -> None:
    """Says where a token of the batch stands, and whether its logits are wanted."""
    batch.pos[index], batch.n_seq_id[index] = place, 1
    batch.seq_id[index][0], batch.logits[index] = sequence, logits


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        serve(lambda: open_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
