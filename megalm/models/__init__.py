"""Plain torch models that know nothing of the cluster, each with the table that says how it is cut."""
