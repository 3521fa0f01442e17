"""Backbone families, one file and one line each."""

from dyntoken.registry import Table

BACKBONES = Table(
    "backbone",
    {
        "vit": "dyntoken.backbones.deit:ViT",
        "t2t": "dyntoken.backbones.t2t:T2T",
        "lvvit": "dyntoken.backbones.lvvit:LVViT",
        "psvit": "dyntoken.backbones.psvit:PSViT",
        "pvt": "dyntoken.backbones.pvt:PVT",
        "cvt": "dyntoken.backbones.cvt:CvT",
        "convnext": "dyntoken.backbones.convnext:ConvNeXt",
        "swin": "dyntoken.backbones.swin:Swin",
    },
)
