"""The Hydra search path `pkg://megalm.conf`: yaml only."""
