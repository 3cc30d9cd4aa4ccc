"""Every knob as a dataclass field, one file per room, and the rules between them. Imports no torch."""
