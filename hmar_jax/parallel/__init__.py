"""Meshes of devices, groups of processes, and the chips they run on."""
