(on request_headers (call $say @reply@ (call $reply #403 @no@)) #0)
