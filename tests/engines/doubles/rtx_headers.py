"""Writes headers with the names of TensorRT-RTX's C++ interface that the backend uses: those of
TensorRT 10.13 or newer, and the declarations that RTX adds.

NVIDIA publishes RTX's own headers in its SDK alone. The added names and signatures are those of its
public samples (github.com/NVIDIA/TensorRT-RTX, samples/apiUsage); the order of virtual functions,
which a compiled library depends on, is not RTX's. Good for compiling against, and for a double that
is compiled with the same headers; never for the real library.

    python rtx_headers.py TENSORRT_INCLUDE_DIR TARGET_DIR
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

VERSION = {"MAJOR": 1, "MINOR": 7, "PATCH": 1, "BUILD": 116}
ENUMS = """
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };
enum class CudaGraphStrategy : int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
class IRuntimeCache;
class IHostMemory;
"""
CACHE = """
class IRuntimeCache : public INoCopy
{
public:
    virtual ~IRuntimeCache() noexcept = default;
    bool deserialize(void const* blob, size_t size) noexcept
    {
        return mImpl->deserialize(blob, size);
    }
    IHostMemory* serialize() const noexcept { return mImpl->serialize(); }

protected:
    apiv::VRuntimeCache* mImpl;
};

"""
# (class, its declarations, those of the interface behind it)
ADDED = {
    "RuntimeConfig": (
        """
    bool setRuntimeCache(IRuntimeCache const& cache) noexcept
    {
        return mImpl->setRuntimeCache(cache);
    }
    IRuntimeCache* createRuntimeCache() const noexcept { return mImpl->createRuntimeCache(); }
    bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept
    {
        return mImpl->setCudaGraphStrategy(strategy);
    }
    void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy strategy) noexcept
    {
        mImpl->setDynamicShapesKernelSpecializationStrategy(strategy);
    }
""",
        """
    virtual bool setRuntimeCache(IRuntimeCache const& cache) noexcept = 0;
    virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
    virtual bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept = 0;
    virtual void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
""",
    ),
    "ExecutionContext": (
        """
    bool isStreamCapturable(cudaStream_t stream) const noexcept
    {
        return mImpl->isStreamCapturable(stream);
    }
""",
        """
    virtual bool isStreamCapturable(cudaStream_t stream) const noexcept = 0;
""",
    ),
}
BEHIND_CACHE = """
class VRuntimeCache : public VRoot
{
public:
    virtual bool deserialize(void const* blob, size_t size) noexcept = 0;
    virtual IHostMemory* serialize() const noexcept = 0;
};
"""


def before_end(text: str, start: str, addition: str) -> str:
    """The addition before the end of the class, or of its public part, that begins so."""
    begin = text.index(start)
    end = re.compile(r"\n(protected:|\};)").search(text, begin)
    assert end is not None, start
    return text[: end.start()] + addition + text[end.start() :]


def write(path: Path, text: str) -> None:
    """Leaves a file of this content untouched, so that nothing is compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def main(source: Path, target: Path) -> None:
    """Copies the headers and adds to them."""
    target.mkdir(parents=True, exist_ok=True)
    made = {header.name: header.read_text() for header in source.glob("Nv*.h")}
    version = made["NvInferVersion.h"]
    for part, number in VERSION.items():
        version = re.sub(
            rf"define TRT_{part}_ENTERPRISE \d+", f"define TRT_{part}_RTX {number}", version
        )
        version = version.replace(f"TRT_{part}_ENTERPRISE", f"TRT_{part}_RTX")
    behind, front = made["NvInferImpl.h"], made["NvInferRuntime.h"]
    for name, (declarations, virtual) in ADDED.items():
        behind = before_end(behind, f"class V{name} : public", virtual)
        front = before_end(front, f"class I{name} : public", declarations)
    namespace = "namespace apiv\n{"
    behind = behind.replace(namespace, ENUMS + namespace, 1)
    behind = behind.replace(
        "class VRuntimeConfig : public", BEHIND_CACHE + "class VRuntimeConfig : public", 1
    )
    front = front.replace(
        "class IRuntimeConfig : public", CACHE + "class IRuntimeConfig : public", 1
    )
    made |= {"NvInferVersion.h": version, "NvInferImpl.h": behind, "NvInferRuntime.h": front}
    for name, text in made.items():
        write(target / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
