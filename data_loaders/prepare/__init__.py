"""From releases as they are downloaded to a data root."""
