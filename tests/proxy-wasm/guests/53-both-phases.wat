(on request_headers (call $say @request@ (call $reply #403 @first@)) #1)
(on response_headers (call $say @response@ (call $reply #404 @second@)) #0)
