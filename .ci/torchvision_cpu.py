"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

The import of such a build fails for one reason: it registers kernels and fake kernels of the operators `nms` and
`qnms`, which only its CUDA library defines. They are defined here before torchvision is imported; nothing calls them.
The set-up for machines without a GPU puts this file and a .pth file that imports it into the environment, so that every
process has it, vLLM's subprocesses included. It imports nothing heavy until torchvision is imported.
"""

import sys
from importlib.machinery import ModuleSpec
from typing import Any

# Keeps the definitions alive.
_libraries: list[Any] = []


class OperatorsFirst:
    """A finder that finds nothing, but defines the operators when torchvision is looked for."""

    def find_spec(self, name: str, *_: Any, **__: Any) -> ModuleSpec | None:
        """Returns None, so that the other finders go on."""
        if name == "torchvision" and not _libraries:
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                _libraries.append(library)
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, OperatorsFirst())
