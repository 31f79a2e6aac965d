"""Images: sources, partition over clients, per-client sampling, batched augmentation."""
