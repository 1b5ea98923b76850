"""What training will need, before anything is allocated: `optfactory plan` and `optfactory.plan`.

sizes        bytes of parameters, gradients and state, of one config and one model
spread       which part of every tensor each rank of a mesh will hold
copies       what several ranks hold the same of
memory_plan  `plan`: the groups, the bytes, what other names would take, whether it fits
model        a model from "package.module:factory", on the meta device
text         a plan as tables
kinds        what pictures of a plan tell apart
plot, page/  a plan as a picture, and as a page for browsers
"""
