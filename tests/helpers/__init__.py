"""What tests share: tiny models, trainings, trainers, truths."""
