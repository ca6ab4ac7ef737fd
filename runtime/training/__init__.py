"""The trainer: `tritium train CONFIG.yaml`."""
