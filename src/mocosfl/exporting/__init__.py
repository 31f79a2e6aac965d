"""A trained encoder in the formats of others."""
