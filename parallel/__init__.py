"""Where tensors live. Today that is one device; process groups and sharding plans have their place here."""
