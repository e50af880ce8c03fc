"""Does benign fine-tuning break refusals, and which method keeps them?"""
