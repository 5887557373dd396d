"""The loss of mask classification: matching of queries with objects, then class, mask and dice losses at points.

Mask2Former, arXiv 2112.01527, section 3.3 and appendix. The terms are those of transformers; all layers are matched
together, so that the costs are copied from the device once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import library
from .mask_classifier import MaskOutputs, mask2former_config
from .mask_options import Mask2FormerOptions

Pairs = tuple[Tensor, Tensor]  # matched queries and objects of an image: indices of equal length, objects ascending


def modeling() -> Any:
    """transformers' module of Mask2Former."""
    return library("mask2former.modeling_mask2former")


def at_shared_points(masks: Tensor, points: Tensor) -> Tensor:
    """The values [N, P] of masks [N, h, w] at points [P, 2], the same ones for all: shares of width and height.

    Bilinear, with zeros outside, as transformers' `sample_point`. Since the masks share the points, it reads rows of N
    neighbouring numbers, which takes half the time of `grid_sample` on a CPU.
    """
    height, width = masks.shape[-2:]
    rows = F.pad(masks, (1, 1, 1, 1)).flatten(1).T.contiguous()  # [(h + 2) * (w + 2), N]
    places = points * points.new_tensor([width, height]) + 0.5
    corners = places.floor()
    (right, below), (column, row) = (places - corners).unbind(-1), corners.long().unbind(-1)
    first, line = row * (width + 2) + column, width + 2
    neighbours = torch.stack([first, first + 1, first + line, first + line + 1], -1)
    left, above = 1 - right, 1 - below
    shares = torch.stack([left * above, right * above, left * below, right * below], -1)
    return F.embedding_bag(neighbours, rows, per_sample_weights=shares, mode="sum").T


class MaskTarget(NamedTuple):
    """The objects of one image."""

    labels: Tensor
    """class indices [N]"""
    masks: Tensor
    """bool or uint8 [N, H, W], at the size of the image"""


class MaskLoss:
    """`(outputs, targets)` to the losses of all layers, by name: loss_class, loss_mask and loss_dice, with weights.

    Mask and dice losses are divided by the number of objects in the micro-batch. Objects of an image beyond the number
    of queries are left out. Pixels in no mask count as outside of every mask.
    """

    def __init__(self, options: Mask2FormerOptions, classes: int):
        self.options = options
        # the library's criterion, for its choice of points; as no module of the model it adds nothing to its state
        self.sampler = modeling().Mask2FormerLoss(mask2former_config(options, classes), {})

    def __call__(self, outputs: MaskOutputs, targets: list[MaskTarget]) -> dict[str, Tensor]:
        with torch.autocast(outputs.masks[0].device.type, enabled=False):
            outputs = MaskOutputs([one.float() for one in outputs.classes], [one.float() for one in outputs.masks])
            matches = self.match(outputs, targets)
            return self.class_loss(outputs, targets, matches) | self.mask_losses(outputs, targets, matches)

    @torch.no_grad()
    def match(self, outputs: MaskOutputs, targets: list[MaskTarget]) -> list[list[Pairs]]:
        """[layer][image] -> the pairs of the lowest total cost; on the device of the outputs."""
        costs = [self.costs(outputs, number, target) for number, target in enumerate(targets)]
        # one copy from the device for all layers and images
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        solver = modeling().linear_sum_assignment
        device = outputs.masks[0].device
        by_image = []
        for cost, part in zip(costs, flat.split([cost.numel() for cost in costs]), strict=True):
            pairs = []
            for layer in part.view(cost.shape).numpy():
                queries, objects = (torch.from_numpy(index) for index in solver(layer))
                order = objects.argsort()
                pairs.append((queries[order].to(device), objects[order].to(device)))
            by_image.append(pairs)
        return [list(layer) for layer in zip(*by_image, strict=True)]

    def costs(self, outputs: MaskOutputs, image: int, target: MaskTarget) -> Tensor:
        """The costs [layers, Q, N] of matching the queries of an image with its N objects, at random points."""
        parts, options = modeling(), self.options
        classes = torch.cat([logits[image] for logits in outputs.classes]).softmax(-1)  # [layers * Q, classes + 1]
        masks = torch.cat([logits[image] for logits in outputs.masks])  # [layers * Q, h, w]
        points = torch.rand(1, options.train_num_points, 2, device=masks.device)
        # as channels of one image, all masks share the points
        true = parts.sample_point(target.masks[None].float(), points, align_corners=False)[0]
        found = at_shared_points(masks, points[0])
        cost = -options.class_weight * classes[:, target.labels]
        # the cross entropy of x and y is softplus(x) - x y, so that all pairs need one product
        entropy = F.softplus(found).sum(1, keepdim=True) - found @ true.T
        cost += options.mask_weight / options.train_num_points * entropy
        cost += options.dice_weight * parts.pair_wise_dice_loss(found, true)
        # a model that diverged has a loss that is not finite, where the trainer stops
        largest = torch.finfo(cost.dtype).max
        cost = cost.nan_to_num(nan=largest, posinf=largest, neginf=largest)
        return cost.view(len(outputs.masks), outputs.masks[0].shape[1], len(target.labels))

    def class_loss(
        self, outputs: MaskOutputs, targets: list[MaskTarget], matches: list[list[Pairs]]
    ) -> dict[str, Tensor]:
        """The cross entropy of the classes, with the weighted mean over queries and the sum over layers."""
        logits = torch.stack(outputs.classes)  # [layers, B, Q, classes + 1]
        nothing = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:-1], nothing, device=logits.device)
        for layer, images in enumerate(matches):
            for image, (queries, objects) in enumerate(images):
                wanted[layer, image, queries] = targets[image].labels[objects]
        weight = logits.new_ones(nothing + 1)
        weight[-1] = self.options.no_object_weight
        # each layer has as many matches, so the mean over all layers is the mean of the layers' means
        mean = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight=weight)
        return {"loss_class": self.options.class_weight * len(matches) * mean}

    def mask_losses(
        self, outputs: MaskOutputs, targets: list[MaskTarget], matches: list[list[Pairs]]
    ) -> dict[str, Tensor]:
        """Cross entropy and dice loss of the matched masks, summed over layers."""
        parts, options = modeling(), self.options
        true = torch.cat([target.masks for target in targets]).float()[:, None]  # [objects of all images, 1, H, W]
        first = [sum(len(target.labels) for target in targets[:image]) for image in range(len(targets))]
        count = max(1, len(true))
        entropy, dice = outputs.masks[0].new_zeros(()), outputs.masks[0].new_zeros(())
        for logits, images in zip(outputs.masks, matches, strict=True):
            found = torch.cat([logits[image, queries] for image, (queries, _) in enumerate(images)])[:, None]
            # in ascending order, so that `true` is copied only if some objects have no query
            chosen = torch.cat([start + objects for start, (_, objects) in zip(first, images, strict=True)])
            with torch.no_grad():
                points = self.sampler.sample_points_using_uncertainty(
                    found,
                    self.sampler.calculate_uncertainty,
                    options.train_num_points,
                    options.oversample_ratio,
                    options.importance_sample_ratio,
                )
                matched = true if len(chosen) == len(true) else true[chosen]
                wanted = parts.sample_point(matched, points, align_corners=False)[:, 0]
            sampled = parts.sample_point(found, points, align_corners=False)[:, 0]
            entropy = entropy + parts.sigmoid_cross_entropy_loss(sampled, wanted, count)
            dice = dice + parts.dice_loss(sampled, wanted, count)
        return {"loss_mask": options.mask_weight * entropy, "loss_dice": options.dice_weight * dice}
