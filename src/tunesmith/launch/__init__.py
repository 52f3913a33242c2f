"""Cluster job files (Slurm, Kubernetes, SkyPilot), made from a recipe. Nothing is started here."""
