"""Experiments: presets, one run measured, runs compared, the quickstart, geometry of latents, plots and reports."""
