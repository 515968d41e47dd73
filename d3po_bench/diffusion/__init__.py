"""Denoising as a policy: processes, steps as Gaussians, rollouts and updates. Knows no model."""
