"""The processes that train together: how they find each other, share the model, and end together."""
