"""The graph that onnxruntime-genai's model builder makes of a Llama checkpoint, in ONNX Runtime.

python -m benchmarks.peers.genai_peer MODEL.onnx NUM_IMAGES NUM_THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count

import numpy as np
import onnxruntime as ort

from benchmarks.peers import shape
from benchmarks.peers.protocol import serve

ROOM = 512  # steps that the caches have room for


def open_model(path: str, num_images: int, num_threads: int) -> Callable[[], object]:
    """A decode step of two rows an image; past and present are one buffer, as genai binds them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows, names = 2 * num_images, [each.name for each in session.get_inputs()]
    size = (rows, shape.NUM_HEADS, shape.CONTEXT + ROOM, shape.HEAD_DIM)
    caches = {
        name: ort.OrtValue.ortvalue_from_numpy(shape.random_rows(*size))
        for name in names
        if name.startswith("past_key_values")
    }
    places = count(shape.CONTEXT)

    def take() -> None:
        place, binding = next(places), session.io_binding()
        feeds = {
            "inputs_embeds": shape.random_rows(rows, 1, shape.HIDDEN_SIZE),
            "input_ids": np.full((rows, 1), 5, np.int64),
            "attention_mask": np.ones((rows, place + 1), np.int64),
            "position_ids": np.full((rows, 1), place, np.int64),
        }
        for name in names:
            if name in caches:
                binding.bind_ortvalue_input(name, caches[name])
            else:
                binding.bind_cpu_input(name, feeds[name])
        for output in session.get_outputs():
            past = output.name.replace("present", "past_key_values")
            if past in caches:
                binding.bind_ortvalue_output(output.name, caches[past])
            else:
                binding.bind_output(output.name)
        session.run_with_iobinding(binding)

    return take


if __name__ == "__main__":
    serve(lambda: open_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
