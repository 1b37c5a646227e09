"""Looking at a model: its predictions beside their images, questions of one's own, and what an answer leant on."""
