(on request_body #1)
(on request_trailers (call $say @reply@ (call $reply #403 @no@)) #1)
