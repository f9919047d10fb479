"""torchvision beside a build of torch whose kernels it does not have."""

import torch


def import_torchvision() -> None:
    """Import torchvision, which timm needs, where its compiled part cannot be loaded.

    Its wheels for Linux bring CUDA kernels alone, and its Python part then fails at the first of two operators that
    nobody has declared. They are declared here without a kernel; who called them would be told so.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401


_KEPT: list[torch.library.Library] = []  # an operator is declared as long as its library lives
