"""Layers that the backbones share; the only loop over blocks is `trunk.Trunk`."""
