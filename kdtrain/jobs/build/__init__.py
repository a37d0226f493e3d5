"""Objects of a run from its configuration: models, teacher, batches, objective."""
