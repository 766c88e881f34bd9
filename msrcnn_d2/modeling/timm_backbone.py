"""Backbones of the library timm, for Detectron2's FPN."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import OmegaConf

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from ..utils.errors import UserError

__all__ = ["TimmBackbone", "build_timm_fpn_backbone"]


class TimmBackbone(Backbone):
    """
    The feature maps of a model of timm, by its `features_only`, named as in :class:`ResNet`: "res2"
    has stride 4, "res3" stride 8, and so on.

    The weights are random. `docs/your_model.md` tells how to start from those that timm publishes.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        out_indices: Sequence[int] | None = None,
        freeze_batch_norm: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            name: of the model in timm, such as "convnext_atto".
            out_features: names of the feature maps, from the smallest stride to the largest.
            out_indices: which maps of timm they are, for models whose last one is not "res5".
            freeze_batch_norm: whether batch norm keeps its weights and statistics, as in
                Detectron2's own pretrained models. Only sensible with pretrained weights.
            kwargs: other arguments of `timm.create_model`, such as `drop_path_rate`.

        Raises:
            UserError: timm is not installed, or has no such model or no such feature maps in it.
        """
        super().__init__()
        wrong = [x for x in out_features if not re.fullmatch("res[1-9]", x)]
        if wrong:
            raise UserError(
                f"The backbone '{name}' has no feature map '{wrong[0]}': name "
                "those of the strides 4 to 32 res2 to res5."
            )
        levels = [int(feature.removeprefix("res")) for feature in out_features]
        if out_indices is None:
            out_indices = [level - 6 for level in levels]  # from the end, which is -1
        try:
            import timm
            from timm.layers import freeze_batch_norm_2d
        except ModuleNotFoundError as error:
            raise UserError(f"The backbone {name} needs timm: pip install timm.") from error

        # Lists in a LazyConfig are of a type of their own
        kwargs = {
            k: OmegaConf.to_container(x) if OmegaConf.is_config(x) else x for k, x in kwargs.items()
        }
        net: Any  # timm says less of it than is there
        try:
            net = timm.create_model(name, features_only=True, out_indices=out_indices, **kwargs)
        except Exception as error:  # it depends on the model what wrong arguments raise
            names = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
            is_known = ":" in name or timm.is_model(name)
            hint = f" Similar names: {', '.join(names)}." if names and not is_known else ""
            raise UserError(
                f"timm cannot build the backbone '{name}': {str(error).rstrip('.')}.{hint}"
            ) from error
        found, strides = net.feature_info.reduction(), [2**level for level in levels]
        if found != strides:
            raise UserError(
                f"The feature maps {list(out_indices)} of '{name}' have the strides {found}, where "
                f"{', '.join(out_features)} have {strides}: choose others by out_features and "
                "out_indices, or another model."
            )
        self.net = freeze_batch_norm_2d(net) if freeze_batch_norm else net
        self._is_channels_last = getattr(net, "output_fmt", None) == "NHWC"
        self._out_features = list(out_features)
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, net.feature_info.channels()))

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: Tensor of shape (N, 3, H, W), normalised images.

        Returns:
            for each of `out_features`, a Tensor of shape (N, C, H / stride, W / stride).
        """
        maps = self.net(x)
        if self._is_channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Build the backbone that yaml configs choose by `MODEL.BACKBONE.NAME`: a :class:`TimmBackbone` of
    the arguments in `MODEL.TIMM`, and the FPN of `MODEL.FPN`.
    """
    timm = cfg.MODEL.TIMM
    features = cfg.MODEL.FPN.IN_FEATURES
    args = {"in_chans": input_shape.channels, "out_features": features, **timm.ARGS}
    return FPN(
        bottom_up=TimmBackbone(timm.NAME, freeze_batch_norm=timm.FREEZE_BATCH_NORM, **args),
        in_features=features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
