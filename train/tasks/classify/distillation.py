"""Knowledge distillation: the loss between a student and a trained teacher."""

from typing import Any

import torch
from timm.task import DistillationTeacher
from torch import Tensor
from torch.nn import functional as F

from ...errors import UserError
from ..models import create_model, input_errors
from .options import Distill


class Teacher:
    """A trained model, and the `loss` between its logits and the student's for the same images."""

    def __init__(self, distill: Distill, *, classes: list[str], size: int, config: dict[str, Any], device: Any):
        """classes, config: the student's class names, and mean and std of its input."""
        self.distill, name = distill, str(distill.teacher)
        model = create_model(name, size, key="task.distill.teacher", pretrained=True, num_classes=None)
        named = model.pretrained_cfg.get("label_names")
        if model.num_classes != len(classes) or (named and list(named) != classes):
            raise UserError(
                f"task.distill.teacher={name} has {model.num_classes} classes, the data has {len(classes)}; "
                "a teacher needs the same classes in the same order"
            )
        self.model = DistillationTeacher(model.requires_grad_(False)).to(device).eval()
        image = torch.zeros(config["input_size"][0], size, size, device=device)
        with input_errors(f"task.distill.teacher={name}", image), torch.no_grad():
            self.model(image[None])
        self.mean, self.std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """images: [B, C, H, W] as the student saw them; logits: [B, classes].

        soft: T^2 KL(teacher || student) at temperature T (Hinton et al., arXiv 1503.02531); hard: cross entropy with
        the teacher's class (DeiT, arXiv 2012.12877, section 4).
        """
        with torch.no_grad():
            target = self.model(self.model.normalize_input(images, self.mean, self.std)).float()
        if self.distill.kind == "hard":
            return F.cross_entropy(logits, target.argmax(1))
        t = self.distill.temperature
        log_student, log_teacher = (F.log_softmax(x / t, dim=1) for x in (logits, target))
        return t**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
