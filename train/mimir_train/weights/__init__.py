"""Where weights come from and go to: folders, the hub, averages, adapters."""
