"""MCTF on DeiT: fusing with a self-teacher, 30 epochs from a dense DeiT.

    python -m dyntoken.main --config=configs/mctf_deit.py --workdir=runs/mctf_deit_s
    python -m dyntoken.main --config=configs/mctf_deit.py:r=20
    python -m dyntoken.main --config=configs/mctf_deit.py:tiny

Follows Lee et al., CVPR 2024, section 3.4, and mlvlab/MCTF as to the losses: two passes of one
network, the student fuses r tokens at each block and the teacher fewer; the cross-entropy of
both, and 3 x the consistency of the class features where the student is sure (confidence above
0.4). Published: 80.1 at 2.60 G (DeiT-S, r=16). What differs: the teacher's number is fixed (there
drawn below 8 at every step, a program each here), and optimizer and augmentation are those of
`configs/tps_deit.py`. On ImageNet: not yet run.
"""

from configs import common, toys


def get_config(arg=None):
    """`size=t|s|b`, `pixels=`, `inat`, `r=`, `teacher_r=`, `tiny`."""
    arg = common.parse_arg(arg, **common.DEIT, r=16, teacher_r=4, tiny=False)
    c = common.deit(arg)
    c.ema = 0.99996
    common.deit_augment(c)
    common.timm_cosine(c, common.per_batch(c, 2.5e-4, 1024))
    if arg.tiny:
        toys.tiny(c)
        arg.r, arg.teacher_r = min(arg.r, 3), min(arg.teacher_r, 1)
    c.model.name = f"mctf_{c.model.name}"
    c.teacher = {**c.model.to_dict(), "r": arg.teacher_r, "weights": "self"}
    c.model.r = arg.r
    c.losses = {"ce": {"weight": 1.0}, "teacher_ce": {"weight": 1.0}, "consistency": {"weight": 3.0}}
    return c
