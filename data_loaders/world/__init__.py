"""The embedded procedural world: every kind of data that a study needs, made in seconds from a seed.

Boards with colored shapes; captions and machine labels of them; and questions and statements in the official files of
VQAv2, GQA and NLVR2. No scene appears in two parts (`scenes.PARTS`).

    world.json                                    config and counts
    pairs/{train,validation}                      shards: image, one caption, machine labels, classes
    unimodal/{train,validation}                   shards: image, classes
    texts/{train,validation}.txt                  one text a line, of scenes that are never drawn
    vqav2/v2_OpenEnded_mscoco_*_questions.json, vqav2/v2_mscoco_*_annotations.json, vqav2/images
    gqa/*_balanced_questions.json, gqa/images
    nlvr2/{train,dev,test1}.json, nlvr2/images
"""
