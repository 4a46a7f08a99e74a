"""Metadata from what Hugging Face processors give."""

import unittest

import numpy
import torch

import models
from pipeweaver import MetadataBuilder
from pipeweaver.job import BatchView, JobView
from pipeweaver.v1 import job_pb2


class MetadataTest(unittest.TestCase):

    def setUp(self):
        self.job = models.make_job("omni", 2)
        self.builder = MetadataBuilder(self.job)

    def test_images_videos_and_sounds_of_several_samples(self):
        mb = self.builder.vlm_microbatch(
            text_lengths=numpy.array([20, 9]),
            image_grid_thw=torch.tensor([[1, 2, 4], [1, 2, 2]]),
            images_per_sample=[1, 1],
            video_grid_thw=[[2, 2, 2]], videos_per_sample=[1, 0],
            audio_tokens=[4], audios_per_sample=[0, 1])
        mb_view = BatchView(JobView(self.job), self.builder.batch([mb])
                            ).microbatches[0]
        self.assertEqual(mb_view.item_tokens[0], [8, 4, 8])
        self.assertEqual(mb_view.uses[0], [(0, 0), (1, 1), (2, 0)])
        self.assertEqual(mb_view.item_tokens[1:4], [[4], [2], [20, 9]])
        # The sounds reach the text through the projector, one for one.
        self.assertEqual(mb_view.uses[1:3], [[(0, 0)], [(0, 1)]])

    def test_items_reach_the_text_past_other_consumers(self):
        job = job_pb2.Job()
        for name, modality in (("vision", job_pb2.MODALITY_IMAGE),
                               ("side", job_pb2.MODALITY_UNSPECIFIED),
                               ("merger", job_pb2.MODALITY_UNSPECIFIED),
                               ("dit", job_pb2.MODALITY_VIDEO),
                               ("text", job_pb2.MODALITY_TEXT)):
            job.modules.add(name=name, modality=modality)
        for producer, consumer, merged in (
                ("vision", "side", 8), ("side", "dit", 1),
                ("vision", "merger", 2), ("merger", "text", 3)):
            job.edges.add(producer=producer, consumer=consumer,
                          tokens_merged=merged)
        builder = MetadataBuilder(job)
        mb = builder.vlm_microbatch([4], [[1, 4, 6]])
        self.assertEqual([u.edge for u in mb.uses], [3])
        # 24 patches are 4 tokens of the text, no fewer.
        with self.assertRaisesRegex(ValueError, r"text_lengths\[0\]: shorter"):
            builder.vlm_microbatch([3], [[1, 4, 6]])
        # The shorter way, whichever edge comes first.
        job.edges.add(producer="vision", consumer="text", tokens_merged=6)
        mb = MetadataBuilder(job).vlm_microbatch([4], [[1, 4, 6]])
        self.assertEqual([u.edge for u in mb.uses], [4])
        del job.edges[3:]
        with self.assertRaisesRegex(
                ValueError, "edges: none leads from 'vision' to 'text'"):
            MetadataBuilder(job).vlm_microbatch([4], [[1, 4, 6]])

    def test_microbatch_without_images_lists_none(self):
        mb = self.builder.vlm_microbatch([5], torch.empty((0, 3)))
        self.assertEqual([i.module for i in mb.items], [3])

    def test_names_what_does_not_fit(self):
        with self.assertRaisesRegex(ValueError, "images_per_sample: needed"):
            self.builder.vlm_microbatch([5, 6], [[1, 2, 2]])
        with self.assertRaisesRegex(ValueError, r"images_per_sample: \[2, 0\]"):
            self.builder.vlm_microbatch([5, 6], [[1, 2, 2]], [2, 0])
        with self.assertRaisesRegex(ValueError, r"text_lengths\[0\]: shorter"):
            self.builder.vlm_microbatch([1], [[1, 2, 2]])
        text_only = MetadataBuilder(models.make_job("t2v", 2))
        with self.assertRaisesRegex(ValueError, "no module that takes images"):
            text_only.vlm_microbatch([9], [[1, 2, 2]])

    def test_lengths_and_counts(self):
        self.assertEqual(self.builder.text_lengths(
            attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])), [2, 3])
        self.assertEqual(self.builder.text_lengths(
            cu_seqlens=torch.tensor([0, 4, 9, 9])), [4, 5])
        self.assertEqual(self.builder.counts_from_input_ids(
            torch.tensor([[7, 1, 7], [1, 1, 7]]), 7), [2, 1])
        self.assertEqual(self.builder.counts_from_input_ids(
            torch.tensor([[7, 1, 7, 1, 1, 7]]), 7, [0, 3, 6]), [2, 1])

    def test_clips_with_prompts(self):
        job = models.make_job("t2v", 2)
        job.modules[1].token_grid.pixels_per_token_height = 16
        job.modules[1].token_grid.pixels_per_token_width = 16
        job.modules[1].token_grid.frames_per_token = 8
        builder = MetadataBuilder(job)
        mb = builder.t2v_microbatch([3, 4], [17, 1], [32, 33], [64, 64])
        view = BatchView(JobView(job), builder.batch([mb])).microbatches[0]
        self.assertEqual(view.item_tokens, [[3, 4], [3 * 2 * 4, 3 * 4]])


if __name__ == "__main__":
    unittest.main()
