"""In vLLM's environment, at the start of each of its processes: two operators of torchvision's, declared.

torchvision is there as built for CUDA. Beside torch for CPUs its operators can't be loaded, and then its import fails
where it describes these two. None is called.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
