"""A run on rented machines: mirrored to object storage, stopped in order, accounted for (docs/cloud.md)."""
