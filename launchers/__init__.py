"""One Hydra app per verb of the life of a model. Light to import: Hydra and torch come in where they are needed."""
