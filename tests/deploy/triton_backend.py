"""A stand-in for triton_python_backend_utils: what the server gives a model and takes from it.

Source: the README of Triton's Python backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    def __init__(self, message: str) -> None:
        self.text = message


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


@dataclass
class Sender:
    responses: list[InferenceResponse] = field(default_factory=list)
    is_closed: bool = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_closed, "a response after the last one"
        if response is not None:
            self.responses.append(response)
        self.is_closed = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)


@dataclass
class Request:
    """inputs: [images, 1]. leaves_after: responses after which its client is gone."""

    inputs: dict[str, np.ndarray]
    leaves_after: int | None = None
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        return self.leaves_after is not None and len(self.sender.responses) >= self.leaves_after


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    values: Any = request.inputs.get(name)
    return None if values is None else Tensor(name, values)
